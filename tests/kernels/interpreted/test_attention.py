"""The Triton kernels of attention on ragged batches whose unseen slots are NaN, and their laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import batch, by_flex, cut, features, heads, requests
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import check

from seamwise.kernels import attention, attention_partial, attention_quant, merge_states
from seamwise.kernels.attn import attention_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
drawn = settings(max_examples=10 if DEVICE == "cpu" else 60)
seeds = st.integers(0, 2**31 - 1)


def near(got: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Hold the error below 4 eps of the dtype, of each element and of 1, which values are about as large as."""
    eps = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), exact.double(), rtol=eps, atol=4 * eps)


@drawn
@given(requests, heads, features, st.sampled_from(DTYPES), st.sampled_from([4, 16]), seeds)
def test_attention(requests: Any, heads: Any, features: Any, dtype: torch.dtype, block: int, seed: int) -> None:
    kv_dtype = torch.float8_e4m3fn if features["scaled"] else dtype
    args = batch(requests, **heads, **features, dtype=dtype, kv_dtype=kv_dtype, block=block, device=DEVICE, seed=seed)
    (out,) = check(attention, "triton", args)
    near(out, by_flex(args), dtype)
    assert bool((out[-2:] == 0).all()), "rows that no request owns"
    r = seed % len(requests)
    start, count = int(args[5][r]), requests[r][1]
    for first, last in ((0, count // 2), (count // 2, count)):  # tiles differ with the batch, results do not
        alone = attention.run("triton", *cut(args, r, first, last))
        near(alone, out[start + first : start + last], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "limits", [{}, {"window": 100, "sinks": True}, {"window": -90}, {"softcap": 2.0, "alibi": True}], ids=str
)
def test_split_keys_are_merged_to_the_whole(
    limits: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = batch([(300, 1), (5, 2), (129, 1)], group=3, dtype=dtype, device=DEVICE, **limits)
    assert attention_triton.num_splits(*args) == 4, "of its 308 slots, 4 units of 64 keys"
    (split,) = check(attention, "triton", args)
    outs, lse = attention_partial.run("triton", *args, 3, torch.float32)
    merged, _ = merge_states.run("triton", outs, lse, dtype)
    monkeypatch.setattr(attention_triton, "num_splits", lambda *args: 1)
    (whole,) = check(attention, "triton", args)
    near(split, whole, dtype)
    near(merged, whole, dtype)
    assert not torch.equal(split, whole) or dtype != torch.float32, "the keys were not split"


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("context", [20, 200])  # the second splits its keys
def test_quantized_rows_stand_for_attention(context: int, dtype: torch.dtype, static: bool) -> None:
    """|q · scale - f64| is at most half a float8 step and attention's own error."""
    args = batch([(context, 2), (3, 5)], dtype=dtype, device=DEVICE, sinks=True)
    scale, group = (torch.full((1,), 0.01, device=DEVICE), 0) if static else (None, 16)
    q, scales = attention_quant.run("triton", *args, torch.float8_e4m3fn, group, scale)
    exact = by_flex(args).flatten(1)
    spread = scales.double().repeat_interleave(q.shape[1] // scales.shape[1], 1)
    half = (q.double().abs() / 16).clamp(min=2.0**-10) * spread
    assert bool(((q.double() * spread - exact).abs() <= half + 4 * torch.finfo(dtype).eps * exact.abs().max()).all())
    assert bool((q[-2:].double() == 0).all()), "rows that no request owns"
    least = 0.01 if static else 1e-10 / 448
    torch.testing.assert_close(scales[-2:], torch.full_like(scales[-2:], least))


def test_what_the_kernel_cannot_serve_is_refused_with_its_reason() -> None:
    args = batch([(3, 2)], dtype=torch.float32, device=DEVICE)
    for limits, reason in (
        ((0, -1.0), "wanted softcap >= 0"),
        ((0, 0.0, torch.ones(3, device=DEVICE)), "sinks has 3 elements but q has"),
    ):
        with pytest.raises(ValueError, match=reason):
            attention.run("triton", *args[:7], *limits)
    with pytest.raises(ValueError, match="share q's dtype or be float8"):
        attention.run("triton", args[0].half(), *args[1:])
    for dtype, group in ((torch.int8, 16), (torch.float8_e4m3fn, 0), (torch.float8_e4m3fn, 32)):
        with pytest.raises(ValueError, match="groups of a head's 16 columns"):
            attention_quant.run("triton", *args, dtype, group)
