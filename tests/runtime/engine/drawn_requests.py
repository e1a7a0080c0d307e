"""Requests as hypothesis draws them, and what each is to get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from fake_tokenizer import FakeTokenizer
from hypothesis import strategies as st

from seamwise.runtime.build.kv_groups import Groups
from seamwise.runtime.engine.outputs import CompletionOutput
from seamwise.runtime.sampling.bad_words import tokens_of_words
from seamwise.runtime.sampling.logprob import Logprob
from seamwise.runtime.sampling.params import RepetitionDetectionParams, RequestOutputKind, SamplingParams
from seamwise.runtime.sampling.report import prompt_logprobs
from seamwise.runtime.sampling.rows import RowOptions, SamplingSlots
from seamwise.runtime.sampling.sampler import sample
from seamwise.runtime.sampling.stop import ended_by_token
from seamwise.runtime.text.detokenize import Detokenizer
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


@dataclass(frozen=True)
class Alone:
    """What a request gets: its outputs, and the log probabilities of its prompt where they are asked for."""

    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None]


def alone(drawn: Drawn, runner: FakeRunner, capacity: int) -> Alone:
    """Return what a request gets, token after token from the runner's rule: no engine, scheduler or cache is asked.

    capacity  tokens of the longest request that the runner's cache holds
    """
    return _alone(drawn.prompt, _Key(drawn.params), capacity - len(drawn.prompt) + 1, runner.kv_groups)


@dataclass(frozen=True)
class _Key:
    """Parameters as a key of a cache: equal where their text is."""

    params: SamplingParams

    def __hash__(self) -> int:
        return hash(repr(self.params))


@lru_cache(4096)
def _alone(prompt: tuple[int, ...], key: _Key, most: int, groups: Groups) -> Alone:
    p, rule = key.params, _rule(groups)
    assert p.max_tokens is not None
    outputs = [_output(prompt, p, index, min(p.max_tokens, most), rule) for index in range(p.n)]
    told: list[dict[int, Logprob] | None] = [None]
    if p.prompt_logprobs is not None and len(prompt) > 1:
        rows = np.array([rule.logits_after([*prompt[:i]]) for i in range(1, len(prompt))], dtype=np.float32)
        found = prompt_logprobs(torch.from_numpy(rows), np.array(prompt[1:]), p.prompt_logprobs, "raw_logprobs")
        for place, one in enumerate(found, start=1):
            told.append(_spelled(one, _detokenizer(prompt[:place], p)))
    return Alone(outputs, told)


@cache
def _rule(groups: Groups) -> FakeRunner:
    return FakeRunner(num_blocks=2, block_size=1, kv_groups=groups)


def _output(
    prompt: tuple[int, ...], p: SamplingParams, index: int, max_tokens: int, rule: FakeRunner
) -> CompletionOutput:
    assert p.seed is not None and p.max_tokens is not None
    encode = FakeTokenizer().encode
    options = RowOptions(
        params=p, seed=p.seed + (index << 48), num_prompt=len(prompt), stop_ids=() if p.ignore_eos else (2,),
        bad_words=tokens_of_words(p.bad_words or (), encode),
    )  # fmt: skip
    slots = SamplingSlots(num_slots=1)
    slots.enter(0, options)
    shown, history = _detokenizer(prompt, p), np.zeros((1, 64), dtype=np.int32)
    history[0, : len(prompt)] = prompt
    made = CompletionOutput(index=index, text="", token_ids=[], logprobs=[] if p.logprobs is not None else None)
    while made.finish_reason is None:
        known = len(prompt) + len(made.token_ids)
        logits = torch.from_numpy(rule.logits_after(history[0, :known].tolist()).astype(np.float32))
        sampled = sample(logits[None], slots.rows(np.array([0]), np.array([known]), history))
        token = int(sampled.tokens[0])
        reason = ended_by_token(made.token_ids, token, p, options.stop_ids, max_tokens)
        if made.logprobs is not None:
            made.logprobs.append(_spelled(sampled.logprobs[0], shown))
            made.cumulative_logprob = (made.cumulative_logprob or 0.0) + made.logprobs[-1][token].logprob
        history[0, known] = token
        made.token_ids.append(token)
        may_stop, stop = len(made.token_ids) > p.min_tokens, None
        if p.include_stop_str_in_output or reason is None or reason[0] != "stop":
            stop = shown.add(token, may_stop=may_stop)
        if reason is not None and stop is None:
            stop = shown.finish(may_stop=may_stop)
        made.text = shown.text
        if stop is not None or reason is not None:
            made.finish_reason, made.stop_reason = reason if stop is None and reason is not None else ("stop", stop)
    return made


def _detokenizer(prompt: Sequence[int], p: SamplingParams) -> Detokenizer:
    return Detokenizer(
        FakeTokenizer(), list(prompt), stop=p.stop_strings, skip_special_tokens=p.skip_special_tokens,  # type: ignore[arg-type]
        include_stop=p.include_stop_str_in_output,
    )  # fmt: skip


def _spelled(found: dict[int, Logprob], shown: Detokenizer) -> dict[int, Logprob]:
    return {
        token: replace(one, decoded_token=text)
        for (token, one), text in zip(found.items(), shown.texts_of(found), strict=True)
    }
