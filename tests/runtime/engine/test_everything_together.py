"""Everything at once, on a model: each request gets what it gets alone, in bits.

Drawn together: grammars, guesses that stand and fall, adapters of which fewer have slots than are asked for, chunks,
preemption, steps planned ahead, shared prefixes, log probabilities, several outputs, seeds, penalties and stops. Alone
a request runs by itself in an engine without any of that, and its grammar's forced tokens one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Series
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_machine import Always
from tiny_adapters import save_adapter
from tiny_models import save_tiny
from tiny_tokenizers import bpe

from seamwise import ModelRunner, SamplingParams
from seamwise.runtime.engine.adapters import Adapters
from seamwise.runtime.engine.drafting import Drafting
from seamwise.runtime.engine.engine import Engine
from seamwise.runtime.engine.lora_request import LoRARequest
from seamwise.runtime.engine.outputs import RequestOutput
from seamwise.runtime.sampling.grammar import GrammarMask, Grammars
from seamwise.runtime.scheduler.config import SchedulerConfig
from seamwise.runtime.scheduler.policies import OURS
from seamwise.runtime.scheduler.view import Plan, View
from seamwise.runtime.speculation.drafter import Known
from seamwise.runtime.text.tokenizer import Tokenizer

BLOCK, LONGEST, MOST = 4, 64, 3
STEM = tuple(range(40, 64))
FORMS: list[dict[str, Any]] = [
    {"regex": r"[ab]{1,3}hello world[0-9]{1,4}"}, {"choice": ["true", "truly", "hello hello"]},
    {"json": {"type": "object", "properties": {"a": {"enum": [True, 12345]}}, "required": ["a"],
              "additionalProperties": False}},
]  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A request: its adapter's number, 0 for none, and how many steps it comes after the one before."""

    prompt: tuple[int, ...]
    params: SamplingParams
    adapter: int = 0
    later: int = 0


@st.composite
def asked(draw: Any) -> Asked:
    start = draw(st.sampled_from([0, 4, 9, 24]))
    form = draw(st.sampled_from([None, None, *FORMS]))
    tokens = draw(st.integers(1, 12))
    params = SamplingParams(
        n=draw(st.sampled_from([1, 1, 2])), seed=draw(st.integers(0, 99)), max_tokens=tokens,
        temperature=draw(st.sampled_from([0.0, 0.7, 1.5])), top_p=draw(st.sampled_from([1.0, 0.8])),
        top_k=draw(st.sampled_from([0, 5])), repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.5])), logprobs=draw(st.sampled_from([None, 0, 3])),
        prompt_logprobs=draw(st.sampled_from([None, None, 1])), ignore_eos=form is None and draw(st.booleans()),
        min_tokens=0 if form else draw(st.sampled_from([0, min(3, tokens)])),
        stop=draw(st.sampled_from([None, None, ["e", "lo"]])), stop_token_ids=draw(st.sampled_from([None, [70, 71]])),
        structured_outputs=form,
    )  # fmt: skip
    prompt = STEM[:start] + tuple(draw(st.lists(st.integers(30, 290), min_size=1, max_size=5)))
    return Asked(prompt, params, draw(st.integers(0, 3)), draw(st.integers(0, 3)))


class Prompter:
    """A drafter that has read what sequences say alone: `right` tokens of it, then another."""

    def __init__(self, right: int) -> None:
        self.right, self.sayings = right, list[list[int]]()

    def propose(self, known: Series[Known]) -> list[list[int]]:
        return [self._guess(one.tokens.tolist(), one.most) for one in known]

    def _guess(self, tokens: list[int], most: int) -> list[int]:
        said = next((s for s in self.sayings if s[: len(tokens)] == tokens and len(s) > len(tokens)), tokens)
        guess = said[len(tokens) :][: min(self.right, most)]
        return guess + [33] * (most - len(guess))


class OneByOne:
    """A mask that nobody can ask about tokens to come."""

    def __init__(self, mask: GrammarMask) -> None:
        self.allowed_words = mask.allowed_words


class World:
    """The model with three adapters, two of which have slots, and what each request gets alone."""

    def __init__(self, folder: Path, pack_dir: Path) -> None:
        save_tiny(folder, "LlamaForCausalLM", vocab_size=300, eos_token_id=0, bos_token_id=1)
        bpe().save(str(folder / "tokenizer.json"))
        self.tokenizer = Tokenizer(folder)
        for number in (1, 2, 3):
            save_adapter(folder / str(number), folder, seed=number)
        self.loras = [None, *(LoRARequest(str(n), n, str(folder / str(n))) for n in (1, 2, 3))]
        options: dict[str, Any] = {
            "device": "cpu", "enable_lora": True, "max_loras": 2, "max_lora_rank": 4, "max_model_len": LONGEST,
            "block_size": BLOCK, "pack_dir": pack_dir, "dtype": "float32",
        }  # fmt: skip
        self.runner = ModelRunner.load(folder, num_speculative_tokens=MOST, **options)
        plain = ModelRunner.load(folder, enforce_eager=True, **options)
        plain.allocate_kv(2 * LONGEST // BLOCK + 1)
        config = SchedulerConfig(max_num_seqs=2, async_scheduling=False)
        self.plain = Engine(plain, self.tokenizer, config, enable_prefix_caching=False, adapters=Adapters(plain, 2))
        self.grammars = Grammars(self.tokenizer, 300, self.plain.eos_ids)
        self.known: dict[str, RequestOutput] = {}

    def alone(self, one: Asked) -> RequestOutput:
        """Return what a request gets alone; only its arrival has no part in it."""
        key = repr(replace(one, later=0))
        if key not in self.known:
            self.known[key] = self._alone(one)
        return self.known[key]

    def _alone(self, one: Asked) -> RequestOutput:
        form, masks = one.params.structured_outputs, list[OneByOne]()
        if form is not None:
            matcher = self.grammars.compile(form)
            masks = [OneByOne(GrammarMask(lambda made=matcher: made, 10)) for _ in range(one.params.n)]
        params = replace(one.params, structured_outputs=None)
        self.plain.add_request(
            "alone", [*one.prompt], params, lora_request=self.loras[one.adapter], mask_providers=masks
        )
        (output,) = [o for o in _steps(self.plain) if o.finished]
        return output

    def check(
        self, requests: Series[Asked], *, blocks: int, right: int | None, caching: bool = True, **limits: Any
    ) -> Counter[str]:  # fmt: skip
        """Run requests together, hold each against what it gets alone, and return how often what happened."""
        wanted, seen, prompter = [self.alone(one) for one in requests], Counter[str](), Prompter(right or 0)

        def planned(view: View, plan: Plan) -> None:
            seen["preempted"] += len(plan.preemptions)

        for one, output in zip(requests, wanted, strict=True):
            prompter.sayings += [[*one.prompt, *c.token_ids] for c in output.outputs]
        if blocks != self.runner.num_blocks:
            self.runner.allocate_kv(blocks)
        drafting = None if right is None else Drafting(drafter=prompter, most=MOST, watch=Always())
        engine = Engine(
            self.runner, self.tokenizer, SchedulerConfig(**limits), enable_prefix_caching=caching, drafting=drafting,
            adapters=Adapters(self.runner, 2), recorder=planned,
        )  # fmt: skip
        done: dict[str, RequestOutput] = {}
        for i, one in enumerate(requests):
            for _ in range(one.later):
                done |= {o.request_id: o for o in engine.step() if o.finished}
            engine.add_request(str(i), [*one.prompt], one.params, lora_request=self.loras[one.adapter])
        done |= {o.request_id: o for o in _steps(engine) if o.finished}
        engine.close()
        for slot in (1, 2):
            self.runner.set_adapter(slot, None)  # the next engine knows of none
        for i, output in enumerate(wanted):
            assert _shown(done[str(i)]) == _shown(output), f"{requests[i]} is not what it is alone"
        pool = engine.scheduler.pool
        assert not pool.holders and pool.num_available == pool.num_blocks - 1, "blocks are lost"
        stats, given = engine.drafting.stats, {one.adapter for one in requests} - {0}
        seen["fell"] = stats.num_draft_tokens - stats.num_accepted_tokens
        seen["stood"], seen["forced"] = stats.num_accepted_tokens, stats.num_forced_tokens
        seen["shared"] = sum(o.metrics.num_cached_tokens for o in done.values() if o.metrics is not None)
        seen["adapters"] = len(given)
        return seen


def _steps(engine: Engine) -> list[RequestOutput]:
    outputs = []
    for _ in range(3000):
        if not engine.has_unfinished_requests():
            return outputs
        outputs += engine.step()
        engine.scheduler.check()
    raise AssertionError("the engine makes no progress")


def _shown(output: RequestOutput) -> list[Any]:
    assert all(c.finish_reason in ("stop", "length") for c in output.outputs), output.outputs
    told = [(c.token_ids, c.text, c.finish_reason, c.stop_reason, c.logprobs) for c in output.outputs]
    return [*told, output.prompt_logprobs]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, pack_dir: Path) -> World:
    return World(tmp_path_factory.mktemp("everything"), pack_dir)


LAW = given(
    requests=st.lists(asked(), min_size=1, max_size=6), blocks=st.sampled_from([20, 28, 60]),
    right=st.sampled_from([None, 0, 1, MOST]), caching=st.booleans(),
    limits=st.fixed_dictionaries({
        "max_num_batched_tokens": st.sampled_from([3, 7, 64]), "max_num_seqs": st.sampled_from([2, 5]),
        "long_prefill_token_threshold": st.sampled_from([0, 0, 3]), "async_scheduling": st.booleans(),
        "scheduler_reserve_full_isl": st.booleans(), "scheduling_policy": st.sampled_from([*OURS]),
    }),
)  # fmt: skip


def _law(world: World, requests: list[Asked], limits: dict[str, Any], **drawn: Any) -> None:
    world.check(requests, **drawn, **limits)


test_each_request_gets_what_it_gets_alone = settings(max_examples=40, deadline=None)(LAW(_law))
test_for_long = pytest.mark.exhaustive(settings(max_examples=20_000, deadline=None)(LAW(_law)))


def test_all_of_it_happens(world: World) -> None:
    """One batch in which everything that the law draws does occur; a law about nothing holds too."""
    greedy = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
    kinds: list[dict[str, Any]] = [
        greedy, {**greedy, "n": 2, "temperature": 0.7, "seed": 3, "repetition_penalty": 1.3, "logprobs": 3},
        {"structured_outputs": FORMS[0], "max_tokens": 40, "seed": 1}, {**greedy, "prompt_logprobs": 1},
    ]  # fmt: skip
    requests = [
        Asked((*STEM, 100 + i // 4), SamplingParams(**kinds[i % 4]), adapter=(0, 1, 1, 2, 3, 3, 0, 2)[i], later=i % 2)
        for i in range(8)
    ]  # fmt: skip
    limits = {"max_num_batched_tokens": 16, "max_num_seqs": 5, "scheduler_reserve_full_isl": False}
    for asynchronous in (False, True):
        seen = world.check(requests, blocks=24, right=1, async_scheduling=asynchronous, **limits)
        assert seen["adapters"] == 3 and all(seen.values()), seen
        assert seen.keys() >= {"preempted", "stood", "fell", "forced", "shared"}


def test_prompts_alone_differ_by_adapter(world: World) -> None:
    """Else rows that read another's adapter would not show."""
    said = [world.alone(Asked(STEM, SamplingParams(temperature=0, max_tokens=8), a)).outputs[0] for a in range(4)]
    assert len({tuple(one.token_ids) for one in said}) == 4
