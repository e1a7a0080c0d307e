"""The sampler against plain definitions: probabilities, each option's sentence in numpy, independence of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seamwise import SamplingParams
from seamwise.runtime.sampling.edit_logits import allowed_words
from seamwise.runtime.sampling.report import MODES, prompt_logprobs
from seamwise.runtime.sampling.rows import RowOptions, SamplingSlots
from seamwise.runtime.sampling.sampler import Sampled, sample

V = 8


@dataclass
class Row:
    """One sequence before its next token."""

    params: SamplingParams
    prompt: list[int] = field(default_factory=lambda: [0])
    output: list[int] = field(default_factory=list)
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)


def run(logits: torch.Tensor, rows: Sequence[Row], mode: str = "raw_logprobs") -> Sampled:
    """Sample with every row in a slot of its own, in an order that is not theirs."""
    slots = np.arange(len(rows))[::-1].copy()
    arrays = SamplingSlots(num_slots=len(rows))
    history = np.full((len(rows), 64), 7, dtype=np.int32)
    for slot, row in zip(slots.tolist(), rows, strict=True):
        tokens = row.prompt + row.output
        history[slot, : len(tokens)] = tokens
        arrays.enter(slot, RowOptions(params=row.params, seed=row.seed, num_prompt=len(row.prompt), **row.options))
    positions = np.array([len(r.prompt) + len(r.output) for r in rows], dtype=np.int64)
    return sample(logits, arrays.rows(slots, positions, history), mode)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    exact = (logits / 0.7).softmax(0)
    params, count = SamplingParams(temperature=0.7), 20_000
    tokens = run(logits.expand(count, -1), [Row(params, seed=i) for i in range(count)]).tokens
    seen = torch.bincount(torch.from_numpy(tokens), minlength=5)
    chi_square = float(((seen - exact * count) ** 2 / (exact * count)).sum())
    assert chi_square < 18.5  # 99.9 % of chi-square with 4 degrees of freedom


@settings(max_examples=40)
@given(st.integers(0, 2**63 - 1), st.integers(0, 5), st.lists(st.integers(0, 99), max_size=5))
def test_a_draw_depends_on_seed_and_position_alone(seed: int, position: int, others: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(len(others) + 1, 200, generator=generator)
    params = SamplingParams(temperature=1.3, top_p=0.95, top_k=50)
    mine = Row(params, output=[1] * position, seed=seed)
    alone = run(logits[:1], [mine]).tokens[0]
    assert run(logits, [mine, *[Row(params, seed=s) for s in others]]).tokens[0] == alone


def test_greedy_takes_the_first_of_equals_and_mixes_with_draws() -> None:
    logits = torch.zeros(2, 50)
    logits[:, [7, 30]] = 4.0
    greedy = SamplingParams(temperature=0)
    assert run(logits, [Row(greedy), Row(greedy)]).tokens.tolist() == [7, 7]
    tokens = run(logits, [Row(SamplingParams(top_k=1, temperature=9.0)), Row(greedy)]).tokens
    assert tokens[0] in (7, 30) and tokens[1] == 7


def reference(logits: np.ndarray, row: Row, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits that are drawn from (divided by temperature), and what log probabilities are of."""
    p, x = row.params, logits.astype(np.float64).copy()
    tokens = row.prompt + row.output
    for t in range(V):
        x[t] += p.biases.get(t, 0.0)
        if p.allowed_token_ids is not None and t not in p.allowed_token_ids:
            x[t] = -np.inf
        if len(row.output) < p.min_tokens and t in (*row.options.get("stop_ids", ()), *p.stop_tokens):
            x[t] = -np.inf
        if t in tokens:
            x[t] = x[t] / p.repetition_penalty if x[t] > 0 else x[t] * p.repetition_penalty
        x[t] -= p.frequency_penalty * row.output.count(t) + p.presence_penalty * (t in row.output)
    for *before, last in row.options.get("bad_words", ()):
        if row.output[len(row.output) - len(before) :] == before and len(before) <= len(row.output):
            x[last] = -np.inf
    for processor in p.logits_processors or ():
        x = processor(row.output, torch.from_numpy(x)).numpy()
    hot = p.temperature if p.temperature > 0 else 1.0
    if p.temperature > 0:
        probs = np.exp(x / hot - (x / hot).max())
        x[probs < p.min_p] = -np.inf
        if 0 < p.top_k < V:
            x[x < np.sort(x)[-p.top_k]] = -np.inf
        probs = np.exp(x / hot - (x / hot).max())
        probs /= probs.sum()
        order = np.argsort(-x, kind="stable")
        kept = order[: 1 + int((probs[order].cumsum() < p.top_p).sum())]
        x[x < x[kept].min()] = -np.inf
    x = x / hot
    values = x if mode.startswith("processed") else logits.astype(np.float64)
    return x, values if mode.endswith("logits") else values - np.log(np.exp(values - values.max()).sum()) - values.max()


TOKENS = st.integers(0, V - 1)


@st.composite
def drawn_rows(draw: Any) -> Row:
    allowed = draw(st.none() | st.sets(TOKENS, min_size=4))
    ids = draw(st.none() | st.sets(TOKENS, min_size=1))
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.7, 1.5])), top_k=draw(st.sampled_from([0, 2, 5])),
        top_p=draw(st.sampled_from([1.0, 0.85])), min_p=draw(st.sampled_from([0.0, 0.1])),
        presence_penalty=draw(st.sampled_from([0.0, 0.4])), frequency_penalty=draw(st.sampled_from([0.0, -0.3])),
        repetition_penalty=draw(st.sampled_from([0.5, 1.0, 2.0])),
        logit_bias=draw(st.dictionaries(TOKENS, st.floats(-2, 2, width=16), max_size=3)),
        allowed_token_ids=None if allowed is None else sorted(allowed), min_tokens=draw(st.integers(0, 3)),
        stop_token_ids=draw(st.lists(TOKENS, max_size=1)), detokenize=False,
        logits_processors=draw(st.sampled_from([None, [lambda ids, x: x * 1.5], [lambda ids, x: x.flip(0)]])),
        logprobs=draw(st.sampled_from([None, 0, 3, -1])) if ids is None else None,
        logprob_token_ids=None if ids is None else sorted(ids),
    )  # fmt: skip
    words = draw(st.lists(st.lists(TOKENS, min_size=1, max_size=3), max_size=2))
    output = draw(st.lists(TOKENS, max_size=5))
    options = {"stop_ids": draw(st.sampled_from([(), (1,)])), "bad_words": words}
    return Row(params, draw(st.lists(TOKENS, min_size=1, max_size=5)), output, draw(st.integers(0, 99)), options)


@settings(max_examples=250)
@given(st.integers(0, 2**31), st.lists(drawn_rows(), min_size=1, max_size=3), st.sampled_from(MODES))
def test_every_option_is_its_definition_in_any_batch(seed: int, rows: list[Row], mode: str) -> None:
    logits = torch.randn(len(rows), V, generator=torch.Generator().manual_seed(seed))
    before = logits.clone()
    sampled = run(logits, rows, mode)
    assert torch.equal(logits, before)
    for r, row in enumerate(rows):
        drawn_from, values = reference(logits[r].numpy(), row, mode)
        token, p = int(sampled.tokens[r]), row.params
        assert (r in sampled.failed) == (not np.isfinite(drawn_from).any())
        if np.isfinite(drawn_from).any():
            assert np.isfinite(drawn_from[token]), "a token that was cut off is drawn"
            if p.temperature == 0:
                assert drawn_from[token] >= drawn_from.max() - 1e-5
        assert token == run(logits[r : r + 1], [row], mode).tokens[0]
        found = sampled.logprobs.get(r)
        assert (found is not None) == p.wants_logprobs
        if found is None:
            continue
        count = {None: 0, -1: V}.get(p.logprobs, p.logprobs)
        top = np.argsort(-values, kind="stable")[:count].tolist()
        wanted = {token, *(top if p.logprob_token_ids is None else p.logprob_token_ids)}
        assert len(found) == len(wanted) and {*found} >= {token, *(p.logprob_token_ids or ())}
        level = np.maximum(values, -1e9)
        for one, entry in found.items():
            assert max(entry.logprob, -1e9) == pytest.approx(float(level[one]), abs=1e-4)
            ranks = 1 + (level > level[one] + 1e-5).sum(), (level > level[one] - 1e-5).sum()
            assert ranks[0] <= entry.rank <= ranks[1]


def test_what_a_mask_forbids_is_not_drawn_and_two_masks_meet() -> None:
    class Provider:
        def allowed_words(self, output_ids: list[int]) -> np.ndarray:
            assert output_ids == [3, 4]
            return allowed_words(np.array([2, 5, 6]), V)

    logits = torch.arange(float(V)).unsqueeze(0)
    options = {"mask_provider": Provider()}
    row = Row(SamplingParams(temperature=0, allowed_token_ids=[1, 2, 5, 7]), output=[3, 4], options=options)
    assert run(logits, [row]).tokens.tolist() == [5]


@pytest.mark.parametrize("wide", [40, 64])
def test_mask_words_are_bits_in_order(wide: int) -> None:
    words = allowed_words(np.array([0, 33]), wide)
    assert words.dtype == np.int32 and words.tolist() == [1, 2]


def test_what_fails_in_one_row_fails_there_alone() -> None:
    def broken(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        raise KeyError("no such word")

    logits = torch.arange(float(V)).expand(3, -1)
    rows = [Row(SamplingParams(temperature=0)) for _ in range(3)]
    rows[1].params = SamplingParams(temperature=0, logits_processors=[broken])
    rows[2].params = SamplingParams(temperature=0, logits_processors=[lambda ids, x: x[:3]])
    sampled = run(logits, rows)
    assert sampled.tokens[0] == V - 1 and {*sampled.failed} == {1, 2}
    assert "no such word" in str(sampled.failed[1]) and "wanted logits (8,)" in str(sampled.failed[2])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("top_k", [0, 3])
def test_no_token_is_made_up(temperature: float, top_k: int) -> None:
    """Token 0, a "!" to most tokenizers, is what an argmax of NaN, or of nothing but -inf, gives."""
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(0))
    logits[1], logits[2, 5] = torch.nan, torch.nan
    plain = SamplingParams(temperature=temperature, top_k=top_k)
    rows = [Row(plain) for _ in range(4)]
    rows[3].params = replace(plain, allowed_token_ids=[4, 6], stop_token_ids=[6], min_tokens=2, max_tokens=9)
    rows[3].options["bad_words"] = [[4]]
    failed = run(logits, rows).failed
    assert {*failed} == {1, 2, 3} and "no token is allowed next" in str(failed[3])
    assert all(isinstance(failed[r], RuntimeError) and "logits are NaN" in str(failed[r]) for r in (1, 2))
    rows[3].options["bad_words"] = []
    assert run(logits, rows).tokens[3] == 4
    certain = replace(plain, logits_processors=[lambda ids, x: x.index_fill(0, torch.tensor([7]), torch.inf)])
    assert run(logits[:1], [Row(certain)]).tokens.tolist() == [7]  # so a processor may choose


def test_a_processor_may_ask_for_the_prompt() -> None:
    def forbid_prompt(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        assert output == [5]
        logits[prompt] = float("-inf")
        return logits

    row = Row(SamplingParams(temperature=0, logits_processors=[forbid_prompt]), prompt=[7, 6], output=[5])
    assert run(torch.arange(float(V)).unsqueeze(0), [row]).tokens.tolist() == [5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logprobs_are_of_the_raw_logits(dtype: torch.dtype) -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    sampled = run(logits, [Row(SamplingParams(temperature=0, logprobs=3, logit_bias={5: 100.0}))])
    exact = logits.double().log_softmax(-1)[0]
    found = sampled.logprobs[0]
    assert sampled.tokens.tolist() == [5] and set(found) == {5, *exact.topk(3).indices.tolist()}
    for token, entry in found.items():
        assert entry.logprob == pytest.approx(float(exact[token]), abs=1e-5)
        assert entry.rank == 1 + int((logits[0] > logits[0, token]).sum())


def test_prompt_logprobs_are_of_the_tokens_that_follow() -> None:
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(0))
    exact = logits.double().log_softmax(-1)
    for count in (0, 2, -1):
        found = prompt_logprobs(logits, np.array([4, 1, 6]), count, "raw_logprobs")
        for r, (token, entries) in enumerate(zip([4, 1, 6], found, strict=True)):
            wide = V if count == -1 else count
            assert set(entries) == {token, *exact[r].topk(wide).indices.tolist()}
            assert entries[token].logprob == pytest.approx(float(exact[r, token]), abs=1e-5)


def test_min_tokens_keeps_stops_away() -> None:
    logits = torch.tensor([[1.0, 9.0, 8.0, 2.0]])
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[2])
    assert run(logits, [Row(params, output=[0], options={"stop_ids": (1,)})]).tokens.tolist() == [3]
    assert run(logits, [Row(params, output=[0, 0], options={"stop_ids": (1,)})]).tokens.tolist() == [1]
