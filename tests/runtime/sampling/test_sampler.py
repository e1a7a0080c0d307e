"""The sampler against plain definitions: probabilities, penalties by their sentences, independence of the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seamwise import SamplingParams
from seamwise.runtime.sampling.sampler import sample
from seamwise.runtime.scheduler.sequence import Sequence


def sequence(
    params: SamplingParams, *, prompt: list[int] | None = None, output: list[int] | None = None, seed: int = 0
) -> Sequence:
    prompt, output = prompt or [0], output or []
    tokens = np.array([*prompt, *output, *[0] * 8], dtype=np.int64)
    return Sequence(
        id="s", tokens=tokens, num_tokens=len(prompt) + len(output), num_prompt=len(prompt), params=params,
        max_tokens=8, arrival=0, seed=seed,
    )  # fmt: skip


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    exact = (logits / 0.7).softmax(0)
    params, count = SamplingParams(temperature=0.7), 20_000
    batch = [sequence(params, seed=i) for i in range(count)]
    tokens = sample(logits.expand(count, -1), batch).tokens
    seen = torch.bincount(torch.tensor(tokens), minlength=5)
    chi_square = float(((seen - exact * count) ** 2 / (exact * count)).sum())
    assert chi_square < 18.5  # 99.9 % of chi-square with 4 degrees of freedom


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


@settings(max_examples=100)
@given(
    st.integers(0, 2**31), st.lists(st.integers(0, 7), min_size=1, max_size=6), st.lists(st.integers(0, 7), max_size=6),
    st.dictionaries(st.integers(0, 7), st.floats(-2, 2, width=16), max_size=4), st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([0.0, 0.4]), st.sampled_from([0.0, 0.3, -0.3]),
)  # fmt: skip
def test_penalties_are_their_definition(
    seed: int, prompt: list[int], output: list[int], biases: dict[int, float], repetition: float, presence: float,
    frequency: float,
) -> None:  # fmt: skip
    logits = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed))
    params = SamplingParams(
        temperature=0, presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition,
        logit_bias=biases,
    )  # fmt: skip
    expected = logits[0].double().tolist()
    for token in range(8):
        expected[token] += biases.get(token, 0.0)
        if token in (*prompt, *output):
            expected[token] = expected[token] / repetition if expected[token] > 0 else expected[token] * repetition
        expected[token] -= frequency * output.count(token) + presence * (token in output)
    before = logits.clone()
    chosen, other = sample(logits, [sequence(params, prompt=prompt, output=output), sequence(SamplingParams())]).tokens
    assert expected[chosen] >= max(expected) - 1e-6
    assert other == sample(logits[1:], [sequence(SamplingParams())]).tokens[0]
    assert torch.equal(logits, before)


def test_min_tokens_keeps_stops_away() -> None:
    logits = torch.tensor([[1.0, 9.0, 8.0, 2.0]])
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[2])
    early, late = sequence(params, output=[0]), sequence(params, output=[0, 0])
    early.stop_ids = late.stop_ids = (1,)
    assert sample(logits, [early]).tokens == [3]
    assert sample(logits, [late]).tokens == [1]
