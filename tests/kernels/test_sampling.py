"""Sampling contracts against plain definitions and transformers' processors, and laws of what they draw.

What a provider must share with its meaning is in test_contracts.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from seamwise.kernels import gumbel_sample, logprobs, penalize, truncate_logits
from seamwise.kernels.cpu.tokenwise_cpu import argmax_rows
from seamwise.kernels.sampling.sampling_noise import draw_keys, gumbel_noise, uniform_noise

MASK64 = (1 << 64) - 1


def chi_square(tokens: Tensor, probs: Tensor) -> float:
    """Return the statistic; with 4 degrees of freedom it exceeds 18.5 once in a thousand times."""
    assert len(probs) == 5
    expected = probs.double() * len(tokens)
    return float(((torch.bincount(tokens, minlength=5) - expected) ** 2 / expected).sum())


def cut(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    rows = len(logits)
    options = (torch.full((rows,), temperature), torch.full((rows,), top_k), torch.full((rows,), top_p))
    return truncate_logits(logits, *options, torch.full((rows,), min_p))


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
    logits = torch.tensor(values) / 7
    other = torch.randn(len(values), generator=torch.Generator().manual_seed(seed))
    ones = torch.ones(2)
    options = (ones, torch.tensor([top_k, 0]), torch.tensor([top_p, 1.0]), torch.tensor([min_p, 0.0]))
    kept = truncate_logits(torch.stack([logits, other]), *options)
    got = set(torch.nonzero(kept[0] > -math.inf).flatten().tolist())
    # float32 may put a probability sum on the other side of top_p.
    fewest, most = (
        kept_by_definition(logits.double().tolist(), top_k, top_p * by, min_p) for by in (1 - 1e-6, 1 + 1e-6)
    )
    assert fewest <= got <= most if top_p < 1 else got == most
    assert torch.equal(kept[1], other)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_truncation_agrees_with_transformers(temperature: float) -> None:
    logits = 2 * torch.randn(6, 3000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ids = torch.zeros(6, 1, dtype=torch.long)
    for options, warper in (
        ({"top_k": 40}, TopKLogitsWarper(40)),
        ({"top_p": 0.8125}, TopPLogitsWarper(0.8125)),  # a float32 is exactly this
        ({"top_p": 1 - 2**-12}, TopPLogitsWarper(1 - 2**-12)),  # beyond the first look
        ({"min_p": 0.0625}, MinPLogitsWarper(0.0625)),
    ):
        wanted = warper(ids, logits / temperature) > -math.inf
        assert torch.equal(cut(logits, temperature=temperature, **options) > -math.inf, wanted), options


def test_equals_of_a_threshold_stay_together() -> None:
    logits = torch.tensor([[3.0, 1.0, 3.0, 1.0, 0.0, 1.0, -0.0]])
    assert (cut(logits, top_k=3) > -math.inf).tolist() == [[True, True, True, True, False, True, False]]
    assert (cut(logits, top_k=6) > -math.inf).all()  # 0.0 and -0.0 are equal
    assert (cut(logits, top_p=0.2) > -math.inf).tolist() == [[True, False, True, False, False, False, False]]
    crowd = torch.full((1, 400), -9.0)
    crowd[:, :201] = 0.0
    crowd[:, 0] = 5.0  # 148 of the 348 that top_k leaves
    assert (cut(crowd, top_k=2, top_p=0.5) > -math.inf).sum() == 201
    tied = torch.zeros(1, 5000)
    assert torch.equal(cut(tied, top_k=2, top_p=0.5), tied)


@pytest.mark.parametrize("digits", [0, 3])  # logits that tie in thousands, and hardly any
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_need_more_than_the_first_look(dtype: torch.dtype, digits: int) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 9000, generator=generator).round(decimals=digits).to(dtype)
    logits[:, 7:2000:3] = -math.inf
    temperature = torch.tensor([0.1, 0.5, 1.0, 3.0, 0.0])
    options = (
        torch.tensor([0, 0, 0, 0, 2]),
        torch.tensor([0.9, 0.99, 0.97, 0.6, 0.9]),
        torch.tensor([0, 0, 0.01, 0, 0]),
    )
    whole = truncate_logits.run("partial", logits, temperature, *options)
    assert torch.equal(whole, truncate_logits.meaning(logits, temperature, *options))
    assert (whole > -math.inf).sum(-1)[1:4].min() > 1024
    for row in range(5):
        alone = truncate_logits.run("partial", *(t[row : row + 1] for t in (logits, temperature, *options)))
        assert torch.equal(alone[0], whole[row])


def test_noise_is_its_published_parts() -> None:
    """The 64-bit key and the 32 bits of a token, by arithmetic on Python's integers."""

    def splitmix64(z: int) -> int:
        z = (z + 0x9E3779B97F4A7C15) & MASK64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
        return z ^ (z >> 31)

    def fmix32(h: int) -> int:
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
        return h ^ (h >> 16)

    assert splitmix64(1234567) == 6457827717110365317  # the generator's published first output for this seed
    assert fmix32(1) == 0x514E28B7
    seeds, positions = [0, -1, 2**63 - 1, -(2**63), 12345], [0, 1, 7, 100000, 3]
    keys = draw_keys(torch.tensor(seeds), torch.tensor(positions))
    uniform = uniform_noise(keys, 50)
    for r, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        key = splitmix64((splitmix64(seed & MASK64) + position * 0x9E3779B97F4A7C15) & MASK64)
        assert int(keys[r]) & MASK64 == key
        for token in (0, 1, 49):
            bits = fmix32(fmix32(token ^ (key & 0xFFFFFFFF)) ^ (key >> 32)) & 0x7FFFFFFF
            assert float(uniform[r, token]) == pytest.approx((bits + 0.5) * 2.0**-31, rel=1e-6)


@given(width=st.integers(1, 70), seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_argmax_is_torchs_with_ties_nans_and_infinities(width: int, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([float("-inf"), float("nan"), -1.0, 0.0, 2.0, float("inf")], dtype=dtype)
    picks = torch.randint(6, (5, width + 3), generator=generator)
    picks[:3] = torch.where(picks[:3] == 1, 0, picks[:3])  # rows without a NaN too
    rows = values[picks][:, :width]
    assert torch.equal(argmax_rows(rows), rows.argmax(-1))


def test_noise_is_gumbel_and_rows_are_independent() -> None:
    keys = draw_keys(torch.arange(64), torch.full((64,), 3))
    noise = gumbel_noise(keys, 4096).double()
    assert abs(float(noise.mean()) - 0.5772) < 0.01 and abs(float(noise.var()) - math.pi**2 / 6) < 0.03
    others = gumbel_noise(draw_keys(torch.arange(2), torch.full((2,), 4)), 4096).double()
    assert float((torch.corrcoef(torch.cat([noise[:2], others])) - torch.eye(4)).abs().max()) < 0.06


def test_draws_follow_the_probabilities() -> None:
    logits, count = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5]), 20_000
    seeds = torch.arange(count)
    for temperature in (0.5, 1.0):
        hot = torch.full((count,), temperature)
        along_seeds = gumbel_sample(logits.expand(count, -1), hot, seeds, torch.zeros_like(seeds))
        along_positions = gumbel_sample(logits.expand(count, -1), hot, torch.zeros_like(seeds), seeds)
        for tokens in (along_seeds, along_positions):
            assert chi_square(tokens, (logits / temperature).softmax(0)) < 18.5


def test_penalties_agree_with_transformers_and_their_sentences() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 70, generator=generator)
    prompts, outputs = torch.randint(70, (2, 30), generator=generator), torch.randint(70, (2, 9), generator=generator)
    history = torch.cat([prompts, outputs], 1)
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(history, logits.clone())
    bitmask = torch.randint(-(2**31), 2**31, (2, 3), generator=generator).int()
    edits: list[list[tuple[int, int, float]]] = [[], []]
    for row in range(2):
        counts = torch.bincount(outputs[row], minlength=70)
        wanted[row] -= 0.4 * counts + 0.3 * (counts > 0)
        edits[row] = [(t, int(counts[t]), 0.0) for t in set(history[row].tolist())]
        for token in range(70):
            if not int(bitmask[row, token // 32]) >> (token % 32) & 1:
                wanted[row, token] = -math.inf
    free = next(t for t in range(70) if t not in history[1] and wanted[1, t] > -math.inf)
    edits[1].append((free, -1, 2.5))
    wanted[1, free] += 2.5
    ids, seen, biases = (torch.tensor(part) for part in zip(*(e for row in edits for e in row), strict=True))
    starts = torch.tensor([0, len(edits[0]), len(ids)])
    penalties = torch.tensor([[1.7, 0.4, 0.3]]).expand(2, 3).contiguous()
    got = penalize(logits, ids, seen, biases, starts, penalties, bitmask)
    torch.testing.assert_close(got, wanted)
    with pytest.raises(ValueError, match="wanted 3 words"):
        penalize(logits, ids, seen, biases, starts, penalties, bitmask[:, :2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logprobs_are_their_definition(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 2000, generator=torch.Generator().manual_seed(3)).to(dtype)
    chosen = torch.tensor([4, 0, 1999])
    own, ranks, top, ids = logprobs(logits, chosen, 20)
    exact = logits.double().log_softmax(-1)
    torch.testing.assert_close(own.double(), exact[torch.arange(3), chosen], rtol=1e-6, atol=0)
    torch.testing.assert_close(top.double(), exact.topk(20).values, rtol=1e-6, atol=0)
    for row in range(3):
        order = sorted(range(2000), key=lambda t: (-float(logits[row, t]), t))
        assert ids[row].tolist() == order[:20]
        assert int(ranks[row]) == 1 + sum(float(logits[row, t]) > float(logits[row, chosen[row]]) for t in range(2000))
    tied_ids = logprobs(torch.zeros(1, 500), torch.tensor([9]), 30)[3]
    assert tied_ids.tolist() == [list(range(30))]
    with pytest.raises(ValueError, match="num_top is 2001"):
        logprobs(logits, chosen, 2001)
