"""An LLM without torch for the engine process: one letter a step, and faults on demand; it starts in a moment.

A prompt's letters come again in its answer, one a step, round and round. The letter X makes the step raise, H makes it
never end, K kills the process, S stops it; Z makes a step last a fifth of a second.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from seamwise.runtime.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from seamwise.runtime.sampling.logprob import Logprob
from seamwise.runtime.sampling.params import SamplingParams

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
            options=SimpleNamespace(max_model_len=MAX_MODEL_LEN, device="cpu", dtype="letters"), block_size=16,
            config=SimpleNamespace(vocab_size=len(LETTERS) + 1, eos_ids=()), num_blocks=101, startup_s={"fake": 0.0},
        )  # fmt: skip
        self.requests: dict[str, tuple[RequestOutput, SamplingParams, list[int]]] = {}
        self.pool = SimpleNamespace(num_available=100, num_blocks=101)
        self.max_num_seqs = max_num_seqs

    @property
    def scheduler(self) -> Any:
        names = deque(self.requests)
        running = [names.popleft() for _ in range(min(len(names), self.max_num_seqs))]
        self.pool.num_available = 100 - len(running)
        return SimpleNamespace(running=running, waiting=names, pool=self.pool)

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def reset_prefix_cache(self) -> None:
        if self.requests:
            raise RuntimeError(f"{len(self.requests)} requests are running; finish or abort them first")

    def add_request(
        self, request_id: str, ids: list[int], params: SamplingParams, *, prompt: str | None = None
    ) -> None:
        if len(ids) == 13:
            raise ValueError("the fake engine takes no prompt of 13 tokens")
        output = RequestOutput(
            request_id=request_id, prompt=prompt, prompt_token_ids=ids,
            metrics=RequestMetrics(arrival_time=time.perf_counter()),
        )  # fmt: skip
        for index in range(params.n):
            logprobs: Any = None if params.logprobs is None else []
            output.outputs.append(CompletionOutput(index=index, text="", token_ids=[], logprobs=logprobs))
        self.requests[request_id] = output, params, ids

    def abort_request(self, request_id: str) -> RequestOutput | None:
        if (held := self.requests.pop(request_id, None)) is None:
            return None
        for completion in held[0].outputs:
            completion.finish_reason = completion.finish_reason or "abort"
        held[0].finished = True
        return held[0]

    def step(self) -> list[RequestOutput]:
        touched = []
        for request_id in list(self.requests)[: self.max_num_seqs]:
            output, params, ids = self.requests[request_id]
            token = ids[len(output.outputs[0].token_ids) % len(ids)]
            _fault(LETTERS[token] if token < len(LETTERS) else "a")
            for completion in output.outputs:
                completion.token_ids.append(token)
                completion.text += LETTERS[token]
                if completion.logprobs is not None:
                    completion.logprobs.append({token: Logprob(-0.5, 1, LETTERS[token])})
                room = min(params.max_tokens or MAX_MODEL_LEN, MAX_MODEL_LEN - len(ids))
                if len(completion.token_ids) >= room:
                    completion.finish_reason = "length"
            if output.outputs[0].finish_reason:
                output.finished = True
                del self.requests[request_id]
            touched.append(output)
        return touched


def _fault(letter: str) -> None:
    if letter == "X":
        raise RuntimeError("the fake engine raises, as told")
    while letter == "H":
        time.sleep(0.01)
    if letter == "K":
        os.kill(os.getpid(), signal.SIGKILL)
    if letter == "S":
        os.kill(os.getpid(), signal.SIGSTOP)
    if letter == "Z":
        time.sleep(0.2)


def make(model: str, *, max_num_seqs: int = 8, fail: str = "", **options: Any) -> Any:
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
    home = Path(tempfile.mkdtemp(prefix="fake-llm-"))
    (home / "tokenizer.json").write_text("{}")
    (home / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "!"}))
    return SimpleNamespace(
        engine=FakeEngine(max_num_seqs), tokenizer=SimpleNamespace(_light=light, directory=home),
        collective_rpc=lambda method, args=(), kwargs=None: [[method, args, kwargs]],
    )  # fmt: skip
