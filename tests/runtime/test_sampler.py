"""The sampler against plain definitions: truncation in float64, exact probabilities, and independence of the batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seamwise import SamplingParams
from seamwise.runtime.noise import draw_key, gumbel_noise
from seamwise.runtime.request import Sequence
from seamwise.runtime.sampler import sample
from seamwise.runtime.truncate import truncate


def sequence(
    params: SamplingParams, *, prompt: list[int] | None = None, output: list[int] | None = None, seed: int = 0
) -> Sequence:
    prompt, output = prompt or [0], output or []
    tokens = np.array([*prompt, *output, *[0] * 8], dtype=np.int64)
    return Sequence(
        id="s", tokens=tokens, num_tokens=len(prompt) + len(output), num_prompt=len(prompt), params=params,
        max_tokens=8, arrival=0, seed=seed,
    )  # fmt: skip


def kept_by_definition(logits: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """min_p, then top_k, then the smallest most likely set of probability top_p, each by its sentence."""
    kept = {i for i, x in enumerate(logits) if x >= max(logits) + (math.log(min_p) if min_p else -math.inf)}
    order = sorted(kept, key=lambda i: -logits[i])
    if 0 < top_k < len(order):
        order = [i for i in order if logits[i] >= logits[order[top_k - 1]]]
    weights = [math.exp(logits[i] - max(logits)) for i in order]
    total, reached, chosen = sum(weights), 0.0, []
    for i, weight in zip(order, weights, strict=True):
        if reached >= top_p * total and top_p < 1:
            break
        chosen.append(i)
        reached += weight
    return set(chosen)


@settings(max_examples=150)
@given(
    st.lists(st.integers(-40, 40), min_size=2, max_size=30, unique=True), st.integers(-1, 12),
    st.sampled_from([0.05, 0.3, 0.5, 0.9, 0.99, 1.0]), st.sampled_from([0.0, 0.01, 0.2, 0.7]), st.integers(0, 99),
)  # fmt: skip
def test_truncation_is_its_definition(values: list[int], top_k: int, top_p: float, min_p: float, seed: int) -> None:
    logits = [v / 7 for v in values]
    other = torch.randn(len(values), generator=torch.Generator().manual_seed(seed))
    rows = torch.stack([torch.tensor(logits), other])
    kept = truncate(rows, top_k=[top_k, 0], top_p=[top_p, 1.0], min_p=[min_p, 0.0])
    got = set(torch.nonzero(kept[0] > -math.inf).flatten().tolist())
    wanted = kept_by_definition(torch.tensor(logits).double().tolist(), top_k, top_p, min_p)
    edge = got ^ wanted  # float32 may put a probability sum on the other side of top_p, by one token
    assert len(edge) <= 1 and (not edge or top_p < 1)
    assert torch.equal(kept[1], other)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    exact = (logits / 0.7).softmax(0)
    params, count = SamplingParams(temperature=0.7), 20_000
    batch = [sequence(params, seed=i) for i in range(count)]
    tokens = sample(logits.expand(count, -1), batch).tokens
    seen = torch.bincount(torch.tensor(tokens), minlength=5)
    chi_square = float(((seen - exact * count) ** 2 / (exact * count)).sum())
    assert chi_square < 18.5  # 99.9 % of chi-square with 4 degrees of freedom


def test_noise_is_gumbel_and_rows_are_independent() -> None:
    noise = gumbel_noise([draw_key(s, 3) for s in range(64)], 4096, torch.device("cpu")).double()
    assert abs(float(noise.mean()) - 0.5772) < 0.01 and abs(float(noise.var()) - math.pi**2 / 6) < 0.03
    assert float(torch.corrcoef(noise[:2])[0, 1].abs()) < 0.06


@settings(max_examples=40)
@given(st.integers(0, 2**63 - 1), st.integers(0, 5), st.lists(st.integers(0, 99), max_size=5))
def test_a_draw_depends_on_seed_and_position_alone(seed: int, position: int, others: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(len(others) + 1, 200, generator=generator)
    params = SamplingParams(temperature=1.3, top_p=0.95, top_k=50)
    mine = sequence(params, output=[1] * position, seed=seed)
    alone = sample(logits[:1], [mine]).tokens[0]
    assert sample(logits, [mine, *[sequence(params, seed=s) for s in others]]).tokens[0] == alone


def test_greedy_takes_the_first_of_equals_and_mixes_with_draws() -> None:
    logits = torch.zeros(2, 50)
    logits[:, [7, 30]] = 4.0
    greedy = SamplingParams(temperature=0)
    assert sample(logits, [sequence(greedy), sequence(greedy)]).tokens == [7, 7]
    tokens = sample(logits, [sequence(SamplingParams(top_k=1, temperature=9.0)), sequence(greedy)]).tokens
    assert tokens[0] in (7, 30) and tokens[1] == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logprobs_are_of_the_raw_logits(dtype: torch.dtype) -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    params = SamplingParams(temperature=0, logprobs=3, logit_bias={5: 100.0})
    sampled = sample(logits, [sequence(params)])
    exact = logits.double().log_softmax(-1)[0]
    found = sampled.logprobs[0]
    assert sampled.tokens == [5] and found is not None and set(found) == {5, *exact.topk(3).indices.tolist()}
    for token, entry in found.items():
        assert entry.logprob == pytest.approx(float(exact[token]), abs=1e-5)
        assert entry.rank == 1 + int((logits[0] > logits[0, token]).sum())


def test_penalties_are_their_definition() -> None:
    logits = torch.tensor([[2.0, -1.0, 3.0, 0.5, 1.0]])
    params = SamplingParams(
        temperature=0, presence_penalty=0.4, frequency_penalty=0.3, repetition_penalty=2.0, logprobs=0
    )
    s = sequence(params, prompt=[0, 1], output=[2, 2, 4])
    expected = logits[0].tolist()
    for token in {0, 1, 2, 4}:
        expected[token] = expected[token] / 2 if expected[token] > 0 else expected[token] * 2
    for token, count in ((2, 2), (4, 1)):
        expected[token] -= 0.3 * count + 0.4
    before = logits.clone()
    assert sample(logits, [s]).tokens == [int(np.argmax(expected))]
    assert torch.equal(logits, before)


def test_min_tokens_keeps_stops_away() -> None:
    logits = torch.tensor([[1.0, 9.0, 8.0, 2.0]])
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[2])
    early, late = sequence(params, output=[0]), sequence(params, output=[0, 0])
    early.stop_ids = late.stop_ids = (1,)
    assert sample(logits, [early]).tokens == [3]
    assert sample(logits, [late]).tokens == [1]
