"""An LLM without torch for the engine process: one letter a step, and faults on demand; it starts in a moment.

A prompt's letters come again in its answer, one a step, round and round. The letter X makes the step raise, H makes it
never end, K kills the process, S stops it; Z makes a step last a fifth of a second.
"""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from seamwise.runtime.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from seamwise.runtime.sampling.logprob import Logprob
from seamwise.runtime.sampling.params import RequestOutputKind, SamplingParams
from seamwise.runtime.speculation.stats import DraftStats

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;!?<>|_-{}[]\"'\n"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MAX_MODEL_LEN = 2000


class FakeEngine:
    """The engine's interface, over a list of letters."""

    def __init__(self, max_num_seqs: int) -> None:
        self.runner = SimpleNamespace(
            options=SimpleNamespace(
                max_model_len=MAX_MODEL_LEN, device="cpu", dtype="letters", tensor_parallel_size=1
            ),
            config=SimpleNamespace(vocab_size=len(LETTERS) + 1), block_size=16, num_blocks=101, startup_s={"fake": 0.0},
        )  # fmt: skip
        self.requests: dict[str, Held] = {}
        self.drafting = SimpleNamespace(stats=DraftStats())
        self.offload = None
        self.pool = SimpleNamespace(num_available=100, num_blocks=101)
        self.max_num_seqs = max_num_seqs
        self.paused: str | None = None
        self.before_pause: set[str] = set()

    @property
    def scheduler(self) -> Any:
        names = list(self.requests)
        self.pool.num_available = 100 - len(names[: self.max_num_seqs])
        return SimpleNamespace(
            running=names[: self.max_num_seqs], waiting=names[self.max_num_seqs :], pool=self.pool, num_steps=0
        )

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def reset_prefix_cache(self) -> None:
        if self.requests:
            raise RuntimeError(f"{len(self.requests)} requests are running; finish or abort them first")

    def add_request(
        self, request_id: str, ids: list[int], params: SamplingParams, *, prompt: str | None = None, priority: int = 0,
        lora_request: None = None, pooling: object = None,
    ) -> None:  # fmt: skip
        if pooling is not None:
            raise ValueError("the fake engine has no embeddings")
        if len(ids) == 13:
            raise ValueError("the fake engine takes no prompt of 13 tokens")
        self.requests[request_id] = Held(request_id, ids, params)

    def add_lora(self, lora_request: object) -> bool:
        raise ValueError("no adapters here")

    remove_lora = add_lora

    def list_loras(self) -> set[int]:
        raise ValueError("no adapters here")

    def abort_request(self, request_id: str) -> RequestOutput | None:
        held = self.requests.pop(request_id, None)
        return None if held is None else held.output("abort")

    def pause(self, mode: str = "abort", *, clear_cache: bool = True) -> list[RequestOutput]:
        if mode not in ("abort", "wait", "keep"):
            raise ValueError(f"pause: mode={mode!r}, wanted 'abort', 'wait' or 'keep'")
        self.paused, self.before_pause = mode, set(self.requests)
        return [self.requests.pop(name).output("abort") for name in self.before_pause] if mode == "abort" else []

    def resume(self) -> None:
        self.paused = None

    @property
    def is_paused(self) -> bool:
        return self.paused in ("abort", "keep") or (self.paused == "wait" and not self._runnable())

    def _runnable(self) -> list[str]:
        return [name for name in self.requests if self.paused is None or name in self.before_pause][: self.max_num_seqs]

    def step(self) -> list[RequestOutput]:
        touched, slow = [], False
        for request_id in self._runnable():
            held = self.requests[request_id]
            token = held.ids[held.count % len(held.ids)]
            letter = LETTERS[token] if token < len(LETTERS) else "?"
            _fault(letter)
            slow = slow or letter == "Z"
            held.take(token, letter)
            ended = held.count >= min(held.params.max_tokens or MAX_MODEL_LEN, MAX_MODEL_LEN - len(held.ids))
            if ended:
                del self.requests[request_id]
            if ended or held.params.output_kind is RequestOutputKind.DELTA:
                touched.append(held.output("length" if ended else None))
        time.sleep(0.2 * slow)
        return touched


class Held:
    """A request, and what of its answer was not given out yet."""

    def __init__(self, request_id: str, ids: list[int], params: SamplingParams) -> None:
        self.request_id, self.ids, self.params = request_id, ids, params
        self.metrics = RequestMetrics(arrival_time=time.perf_counter())
        self.count = 0
        self.new: list[int] = []
        self.text = ""

    def take(self, token: int, letter: str) -> None:
        self.count += 1
        self.new.append(token)
        self.text += letter

    def output(self, reason: str | None) -> RequestOutput:
        """Give out what is new."""
        rows: Any = None
        if self.params.logprobs is not None:
            rows = [{t: Logprob(-0.5, 1, c)} for t, c in zip(self.new, self.text, strict=True)]
        made = RequestOutput(
            request_id=self.request_id, prompt=None, prompt_token_ids=self.ids, finished=reason is not None,
            metrics=self.metrics,
            outputs=[
                CompletionOutput(index=i, text=self.text, token_ids=self.new, logprobs=rows, finish_reason=reason)
                for i in range(self.params.n)
            ],
        )  # fmt: skip
        self.new, self.text = [], ""
        return made


def _fault(letter: str) -> None:
    if letter == "X":
        raise RuntimeError("the fake engine raises, as told")
    while letter == "H":
        time.sleep(0.01)
    if letter == "K":
        os.kill(os.getpid(), signal.SIGKILL)
    if letter == "S":
        os.kill(os.getpid(), signal.SIGSTOP)


def make(
    model: str, *, max_num_seqs: int = 8, fail: str = "", seed: int = 0,
    data_parallel_size: int = 1, data_parallel_rank: int = 0, **options: Any,
) -> Any:  # fmt: skip
    """Return the fake LLM. fail: how its start goes wrong."""
    if options:
        raise ValueError(f"there is no option {next(iter(options))!r}")
    if fail == "value":
        raise ValueError("model: got 'nothing', wanted something; pass --model")
    if fail == "memory":
        raise MemoryError("cannot allocate 1 TiB")
    if fail == "machine":
        raise RuntimeError("the disk is on fire")
    if fail == "exit":
        os._exit(7)
    if fail == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fail == "hang":
        time.sleep(3600)
    vocabulary = {letter: i for i, letter in enumerate(LETTERS)} | {"�": len(LETTERS)}
    light = Tokenizer(models.WordLevel(vocabulary, unk_token="�"))
    light.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    light.decoder = decoders.Fuse()
    tokenizer = SimpleNamespace(
        as_json=light.to_str,
        split_special_tokens=False,
        chat_templates={"default": TEMPLATE},
        special_tokens={"eos_token": "!"},
    )
    engine, asleep = FakeEngine(max_num_seqs), []

    def sleep(level: int) -> None:
        engine.reset_prefix_cache()
        asleep.append(level)

    def collective_rpc(method: str, args: tuple[Any, ...] = (), kwargs: Any = None) -> list[Any]:
        if method == "slow":
            time.sleep(args[0])
        return [[method, args, kwargs]]

    return SimpleNamespace(
        sleep=sleep, wake_up=lambda tags=None: asleep.clear(), is_sleeping=lambda: bool(asleep),
        engine=engine, reset_prefix_cache=engine.reset_prefix_cache,
        tokenizer=tokenizer, get_default_sampling_params=SamplingParams, takes_steps_together=False,
        collective_rpc=collective_rpc,
    )  # fmt: skip
