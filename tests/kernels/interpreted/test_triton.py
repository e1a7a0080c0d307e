"""Every Triton kernel against its meaning in float64, with drawn shapes, strides and values.

On a CPU these run in Triton's interpreter (started by ../test_triton_interpreted.py), in float32 and float16: the
interpreter truncates where bfloat16 rounds, and its bfloat16 `dot` is wrong (triton #4972). On a GPU they run as
compiled kernels, in bfloat16 too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seamwise.kernels import add_rms_norm, attention, gather_rows, kv_append, rms_norm, rope, silu_mul
from seamwise.kernels.contract import Contract

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
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


@drawn
@given(st.integers(0, 9), st.integers(1, 300), dtypes, st.sampled_from([0, 5]), seeds)
def test_norms(tokens: int, width: int, dtype: torch.dtype, padding: int, seed: int) -> None:
    x, residual = (rows(tokens, width, dtype, seed + i, padding=padding) for i in range(2))
    weight = rows(1, width, dtype, seed + 2)[0]
    whole = check(rms_norm, x, weight, 1e-5)
    normed, total = check(add_rms_norm, x, residual, weight, 1e-5)
    for t in range(min(tokens, 2)):  # split == whole, in bits
        assert torch.equal(rms_norm.run("triton", x[t : t + 1], weight, 1e-5), whole[t : t + 1])
        one = add_rms_norm.run("triton", x[t : t + 1], residual[t : t + 1], weight, 1e-5)
        assert torch.equal(one[0], normed[t : t + 1]) and torch.equal(one[1], total[t : t + 1])
    check(rms_norm, x.contiguous().unsqueeze(0), weight, 1e-5)


def test_norm_agrees_with_torch() -> None:
    x, weight = rows(5, 200, torch.float32, 0), rows(1, 200, torch.float32, 1)[0]
    torch.testing.assert_close(rms_norm.run("triton", x, weight, 1e-6), F.rms_norm(x, (200,), weight, 1e-6))


@drawn
@given(st.integers(0, 6), st.integers(1, 9), st.sampled_from([2, 16, 48, 64, 80, 128]), dtypes, seeds)
def test_rope(tokens: int, heads: int, width: int, dtype: torch.dtype, seed: int) -> None:
    x = rows(tokens, heads * width, dtype, seed, padding=2 * width).unflatten(1, (heads, width))
    check(rope, x, rows(tokens, width, dtype, seed + 1, padding=3), rows(tokens, width, dtype, seed + 2))


def test_rope_agrees_with_transformers() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x, cos, sin = (
        rows(7, 4 * 16, torch.float32, 0).unflatten(1, (4, 16)),
        *(rows(7, 16, torch.float32, s) for s in (1, 2)),
    )
    theirs, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos[None], sin[None])
    torch.testing.assert_close(rope.run("triton", x, cos, sin), theirs[0].transpose(0, 1))


@drawn
@given(st.integers(0, 9), st.integers(1, 1100), dtypes, st.sampled_from([0, 6]), seeds)
def test_silu_mul(tokens: int, width: int, dtype: torch.dtype, padding: int, seed: int) -> None:
    check(silu_mul, rows(tokens, 2 * width, dtype, seed, padding=padding))


@drawn
@given(st.integers(1, 20), st.integers(0, 9), st.integers(1, 1100), dtypes, seeds)
def test_gather_rows(table_rows: int, tokens: int, width: int, dtype: torch.dtype, seed: int) -> None:
    index = torch.randint(table_rows, (tokens,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    table = rows(table_rows, width, dtype, seed, padding=1)
    assert torch.equal(gather_rows.run("triton", table, index), table[index])


@drawn
@given(st.integers(0, 9), st.integers(1, 4), st.sampled_from([16, 40, 64]), st.sampled_from([4, 16]), dtypes, seeds)
def test_kv_append(tokens: int, heads: int, width: int, block: int, dtype: torch.dtype, seed: int) -> None:
    args = kv_append.make_inputs(
        {"T": tokens, "K": heads, "D": width, "P": block}, dtype=dtype, device=DEVICE, seed=seed
    )
    copies = [a.clone() for a in args]
    kv_append.run("triton", *args)
    kv_append.meaning(*copies)
    assert torch.equal(args[2], copies[2]) and torch.equal(args[3], copies[3])


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
