"""Requests as hypothesis draws them, and what each gets with an engine to itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from fake_tokenizer import FakeTokenizer
from hypothesis import strategies as st

from seamwise.runtime.build.kv_groups import Groups
from seamwise.runtime.engine.engine import Engine
from seamwise.runtime.engine.outputs import CompletionOutput
from seamwise.runtime.sampling.params import RepetitionDetectionParams, RequestOutputKind, SamplingParams
from seamwise.runtime.scheduler.config import SchedulerConfig
from seamwise.testing import FakeRunner

STEM = (3, 4, 3, 5, 6, 3, 3, 4, 5, 5, 4, 6)


@dataclass(frozen=True)
class Drawn:
    """A request."""

    prompt: tuple[int, ...]
    params: SamplingParams
    salt: str | None = None


@st.composite
def drawn_requests(draw: Any, aborts: bool = True) -> Drawn:
    """Draw a request whose prompt often shares its start with others, whole blocks of it too."""
    prompt = STEM[: draw(st.integers(0, len(STEM)))] + tuple(draw(st.lists(st.integers(3, 6), min_size=1, max_size=4)))
    max_tokens = draw(st.integers(1, 12))
    prompt_logprobs = draw(st.sampled_from([None, None, None, 1]))
    params = SamplingParams(
        n=draw(st.sampled_from([1, 1, 1, 2])),
        temperature=draw(st.sampled_from([0.0, 0.7, 1.5])),
        top_k=draw(st.sampled_from([0, 3])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        presence_penalty=draw(st.sampled_from([0.0, 0.5])),
        seed=draw(st.integers(0, 9)),
        max_tokens=max_tokens,
        min_tokens=draw(st.sampled_from([0, 0, min(3, max_tokens)])),
        ignore_eos=draw(st.booleans()),
        stop=draw(st.sampled_from([None, None, "a", ["ab", "cc"]])),
        stop_token_ids=draw(st.sampled_from([None, None, [7]])),
        include_stop_str_in_output=draw(st.booleans()),
        logprobs=draw(st.sampled_from([None, None, 2])),
        prompt_logprobs=prompt_logprobs,
        bad_words=draw(st.sampled_from([None, None, ["ab", "c"]])),
        repetition_detection=draw(
            st.sampled_from([None, None, RepetitionDetectionParams(max_pattern_size=2, min_count=2)])
        ),
        output_kind=draw(st.sampled_from([*RequestOutputKind])),
        stream_interval=draw(st.sampled_from([None, 3])),
    )
    return Drawn(prompt, params, draw(st.sampled_from([None, None, "salt"])))


def alone(drawn: Drawn, runner: FakeRunner, capacity: int) -> list[CompletionOutput]:
    """Return what a request gets with an engine to itself, all of its prompt in one step, without sharing.

    capacity  tokens of the longest request that the runner's cache holds
    """
    return _alone(drawn.prompt, _Key(drawn.params), capacity, runner.block_size, runner.kv_groups)


@dataclass(frozen=True)
class _Key:
    """Parameters as a key of a cache: equal where their text is."""

    params: SamplingParams

    def __hash__(self) -> int:
        return hash(repr(self.params))


@lru_cache(4096)
def _alone(
    prompt: tuple[int, ...], key: _Key, capacity: int, block_size: int, groups: Groups
) -> list[CompletionOutput]:
    blocks = -(-min(capacity, len(prompt) + 12) // block_size) * len(groups)
    large = FakeRunner(num_blocks=blocks * key.params.n + 1, block_size=block_size, kv_groups=groups)
    config = SchedulerConfig(async_scheduling=False)
    engine = Engine(large, FakeTokenizer(), config, enable_prefix_caching=False)  # type: ignore[arg-type]
    most = capacity - len(prompt) + 1
    assert key.params.max_tokens is not None
    params = replace(
        key.params, output_kind=RequestOutputKind.FINAL_ONLY, max_tokens=min(key.params.max_tokens, most),
        min_tokens=min(key.params.min_tokens, most),
    )  # fmt: skip
    engine.add_request("alone", list(prompt), params)
    outputs = []
    while engine.has_unfinished_requests():
        outputs = engine.step() or outputs
    engine.close()
    return outputs[0].outputs
