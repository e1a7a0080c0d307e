"""Triton kernels against their meaning in float64 and against others.

Here is what a contract's record cannot say (test_contracts.py has the rest): agreement with others' implementations,
ragged batches of attention, refusals.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seamwise.kernels import attention, rms_norm, rope
from seamwise.kernels.contract import Contract

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
drawn = settings(max_examples=12 if DEVICE == "cpu" else 60)
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31 - 1)


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def check(contract: Contract, *args: Any) -> Any:
    """Hold |kernel - f64| <= 2 (|meaning at the dtype - f64| + eps max|f64|) for every result; return the kernel's."""
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    got = contract.run("triton", *args)
    results = zip(tensors(got), tensors(contract.meaning(*args)), tensors(contract.meaning(*wide)), strict=True)
    for kernel, same, exact in results:
        assert kernel.shape == exact.shape and kernel.dtype == same.dtype
        if exact.numel():
            eps = torch.finfo(kernel.dtype).eps
            budget = 2 * ((same - exact).abs().max() + eps * exact.abs().max())
            assert (kernel - exact).abs().max() <= budget
    return got


def rows(tokens: int, width: int, dtype: torch.dtype, seed: int, *, padding: int = 0) -> Tensor:
    """Draw (tokens, width), a view of a wider matrix whose other columns are NaN."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.full((tokens, width + padding), torch.nan)
    matrix[:, :width] = torch.randn(tokens, width, generator=generator) * 3
    return matrix.to(DEVICE, dtype)[:, :width]


def test_norm_agrees_with_torch() -> None:
    x, weight = rows(5, 200, torch.float32, 0), rows(1, 200, torch.float32, 1)[0]
    torch.testing.assert_close(rms_norm.run("triton", x, weight, 1e-6), F.rms_norm(x, (200,), weight, 1e-6))


def test_rope_agrees_with_transformers() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x, cos, sin = (
        rows(7, 4 * 16, torch.float32, 0).unflatten(1, (4, 16)),
        *(rows(7, 16, torch.float32, s) for s in (1, 2)),
    )
    theirs, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos[None], sin[None])
    torch.testing.assert_close(rope.run("triton", x, cos, sin), theirs[0].transpose(0, 1))


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int, int, int, int]:
    requests = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20)), min_size=1, max_size=4))
    kv_heads, group = draw(st.integers(1, 2)), draw(st.sampled_from([1, 3, 4]))
    return requests, kv_heads, group, draw(st.sampled_from([16, 24, 64])), draw(st.sampled_from([4, 16]))


@drawn
@given(batches(), dtypes, seeds)
def test_attention(batch: tuple[list[tuple[int, int]], int, int, int, int], dtype: torch.dtype, seed: int) -> None:
    requests, kv_heads, group, width, block = batch
    args = attention_arguments(requests, kv_heads, group, width, block, dtype, seed)
    out = check(attention, *args)
    q, k_cache, v_cache, table, lengths, starts, scale = args
    for r, (context, count) in enumerate(requests):
        if not count:
            continue
        alone = attention.run(
            "triton", q[starts[r] : starts[r + 1]], k_cache, v_cache, table[r : r + 1], lengths[r : r + 1],
            torch.tensor([0, count], dtype=torch.int32, device=DEVICE), scale,
        )  # fmt: skip
        torch.testing.assert_close(alone, out[starts[r] : starts[r + 1]])  # tiles differ with the batch, results do not
        mask = torch.ones(count, context + count, dtype=torch.bool, device=DEVICE).tril(context)
        keys, values = (
            c[table[r].long()].transpose(0, 1).flatten(1, 2)[:, : context + count].double() for c in (k_cache, v_cache)
        )
        queries = q[starts[r] : starts[r + 1]].transpose(0, 1).double()
        exact = F.scaled_dot_product_attention(
            queries[None], keys[None], values[None], mask, scale=scale, enable_gqa=True
        )
        eps = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            out[starts[r] : starts[r + 1]].double(), exact[0].transpose(0, 1), rtol=eps, atol=4 * eps
        )


def attention_arguments(
    requests: list[tuple[int, int]], kv_heads: int, group: int, width: int, block: int, dtype: torch.dtype, seed: int
) -> tuple[Any, ...]:
    """Requests of (context, queries) over shuffled blocks; slots that no token owns are NaN; two rows of padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [context + count for context, count in requests]
    owned = [-(-n // block) for n in lengths]
    order = torch.randperm(sum(owned), generator=generator).to(torch.int32) + 1
    table = torch.zeros(len(requests), max(1, *owned), dtype=torch.int32)
    caches = torch.full((2, sum(owned) + 1, kv_heads, block, width), torch.nan)
    for r, blocks in enumerate(order.split(owned)):
        table[r, : owned[r]] = blocks
        for position in range(lengths[r]):
            at = (slice(None), int(blocks[position // block]), slice(None), position % block)
            caches[at] = torch.randn(2, kv_heads, width, generator=generator)
    starts = torch.tensor([0, *torch.tensor([c for _, c in requests]).cumsum(0).tolist()], dtype=torch.int32)
    q = torch.randn(int(starts[-1]) + 2, kv_heads * group, width, generator=generator)
    on = lambda x: x.to(DEVICE)  # noqa: E731
    return (
        on(q).to(dtype), on(caches[0]).to(dtype), on(caches[1]).to(dtype), on(table),
        on(torch.tensor(lengths, dtype=torch.int32)), on(starts), width**-0.5,
    )  # fmt: skip


def test_rows_that_no_request_owns_are_zero() -> None:
    args = attention_arguments([(3, 2), (0, 1)], 1, 2, 16, 4, torch.float32, 0)
    out = attention.run("triton", *args)
    assert bool((out[3:] == 0).all()) and bool((out[:3] != 0).any())


def test_what_a_kernel_cannot_serve_is_refused_with_its_reason() -> None:
    with pytest.raises(ValueError, match="rms_norm: provider 'triton' cannot serve this call: weight has 3 elements"):
        rms_norm.run("triton", rows(2, 4, torch.float32, 0), torch.ones(3, device=DEVICE), 1e-5)
