"""Sampling's Triton kernels: their noise in bits, and what the contracts' generic tests do not draw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from laws import check
from torch import Tensor

from seamwise.kernels import gumbel_sample, logprobs, penalize, truncate_logits
from seamwise.kernels.sampling.sampling_noise import (
    draw_key,
    draw_keys,
    gumbel,
    gumbel_noise,
    uniform,
    uniform_noise,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@triton.jit
def _noise_kernel(seeds_ptr, positions_ptr, keys_ptr, uniform_ptr, gumbel_ptr, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    token = tl.arange(0, BLOCK)
    key = draw_key(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    tl.store(keys_ptr + row, key.to(tl.int64))
    tl.store(uniform_ptr + row * V + token, uniform(key, token), mask=token < V)
    tl.store(gumbel_ptr + row * V + token, gumbel(key, token), mask=token < V)


def test_noise_has_the_bits_of_torch() -> None:
    seeds = torch.tensor([0, -1, 2**63 - 1, -(2**63), 12345], device=DEVICE)
    positions, width = torch.tensor([0, 1, 7, 100000, 3], device=DEVICE), 1000
    keys = torch.empty_like(seeds)
    uniforms, noise = (torch.empty(5, width, device=DEVICE) for _ in range(2))
    _noise_kernel[(5,)](seeds, positions, keys, uniforms, noise, width, 1024)
    wanted = draw_keys(seeds, positions)
    assert torch.equal(keys, wanted) and torch.equal(uniforms, uniform_noise(wanted, width))
    torch.testing.assert_close(noise, gumbel_noise(wanted, width), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thresholds_among_equals_zeros_and_infinities(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(8, 70, generator=generator).mul(2).round().to(DEVICE, dtype)  # -0.0 and 0.0 among them
    logits[:, 5:30] = float("-inf")
    logits[7, 1:] = float("-inf")
    ones = torch.ones(8, device=DEVICE)
    top_k = torch.tensor([1, 3, 0, 20, 69, -1, 5, 5], device=DEVICE)
    top_p = torch.tensor([1.0, 0.31, 0.57, 0.9, 1.0, 0.01, 0.83, 0.5], device=DEVICE)
    for min_p in (0.0, 0.05, 1.0) if dtype == torch.float32 else (0.05,):
        args = (logits, 0.7 * ones, top_k, top_p, min_p * ones)
        (kept,) = check(truncate_logits, "triton", args)
        assert torch.equal(kept, truncate_logits.run("torch", *args))


@pytest.mark.parametrize(("top_p", "kept"), [(0.7, 1), (0.75, 2)])
def test_top_p_is_of_what_top_k_leaves(top_p: float, kept: int) -> None:
    logits = torch.tensor([[1.0, 0.0, -3.0, -4.0, -5.0]], device=DEVICE)  # 0.731 and 0.269 of the first two
    one = torch.ones(1, device=DEVICE)
    args = (logits, one, torch.tensor([2], device=DEVICE), top_p * one, 0 * one)
    assert int((truncate_logits.run("triton", *args) > float("-inf")).sum()) == kept


def test_a_row_with_nothing_allowed_gives_token_0() -> None:
    logits = torch.full((2, 40), float("-inf"), device=DEVICE)
    ids = torch.arange(2, device=DEVICE)
    hot = torch.tensor([0.0, 1.0], device=DEVICE)
    assert gumbel_sample.run("triton", logits, hot, ids, ids).tolist() == [0, 0]


def _refused(contract: Any, args: tuple[Any, ...], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        contract.run("triton", *args)


def test_refusals() -> None:
    logits: Tensor = torch.zeros(64, 4, device=DEVICE).T
    floats, ids = torch.ones(4, device=DEVICE), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    starts = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    penalties = torch.ones(4, 3, device=DEVICE)
    _refused(gumbel_sample, (logits, floats, ids, ids), "contiguous in its last dimension")
    _refused(truncate_logits, (logits, floats, ids, floats, floats), "contiguous in its last dimension")
    _refused(logprobs, (logits, ids, 1), "contiguous in its last dimension")
    _refused(logprobs, (logits.contiguous(), ids, 65), "wanted 0 to 64")
    _refused(
        penalize, (logits, ids[:0], ids[:0], floats[:0], starts, penalties, None), "contiguous in its last dimension"
    )
    mask = torch.zeros(4, 1, dtype=torch.int32, device=DEVICE)
    _refused(penalize, (logits.contiguous(), ids[:0], ids[:0], floats[:0], starts, penalties, mask), "mask has 1 words")
