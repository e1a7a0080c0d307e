"""Triton's fused token-wise kernels against their unfused ones in bits, and values that drawn inputs do not reach."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from seamwise.kernels import (
    add_rms_norm,
    add_rms_norm_quant,
    gelu_mul,
    kv_append,
    lora_shrink,
    quantize,
    rms_norm,
    rms_norm_quant,
    rope,
    rope_kv_write,
    rope_table,
    silu_mul,
    silu_mul_quant,
    swiglu_clamped,
)
from seamwise.kernels.quant.quantize import scheme

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCHEMES = [
    scheme(group, int8, static, DEVICE) for group, int8, static in ((0, 0, 0), (16, 1, 0), (0, 0, 1), (128, 0, 0))
]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def same(fused: tuple[Tensor, ...], unfused: tuple[Tensor, ...]) -> None:
    for a, b in zip(fused, unfused, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_is_unfused(scheme: tuple[torch.dtype, int, Tensor | None], dtype: torch.dtype) -> None:
    x, residual, (weight, *_) = (draw(4, 300, dtype=dtype, seed=s) for s in range(3))
    normed = rms_norm.run("triton", x, weight, 1e-6)
    same(rms_norm_quant.run("triton", x, weight, 1e-6, *scheme), quantize.run("triton", normed, *scheme))
    normed, total = add_rms_norm.run("triton", x, residual, weight, 1e-6)
    fused = add_rms_norm_quant.run("triton", x, residual, weight, 1e-6, *scheme)
    same(fused, (*quantize.run("triton", normed, *scheme), total))
    activated = silu_mul.run("triton", x)
    same(silu_mul_quant.run("triton", x, *scheme), quantize.run("triton", activated, *scheme))


def test_groups_of_a_row_in_several_programs() -> None:
    x = draw(2, 2 * 2500, dtype=torch.bfloat16)
    chosen = scheme(128, False, False, DEVICE)
    same(silu_mul_quant.run("triton", x, *chosen), quantize.run("triton", silu_mul.run("triton", x), *chosen))


def test_nan_comes_through_activations() -> None:
    x = torch.full((1, 4), torch.nan, device=DEVICE)
    for result in (swiglu_clamped.run("triton", x), gelu_mul.run("triton", x), silu_mul.run("triton", x)):
        assert bool(result.isnan().all())


def test_columns_that_do_not_turn_pass_whatever_they_are() -> None:
    x, angles = draw(2, 1, 24), draw(2, 8)
    x[..., 8:], x[0, 0, 9] = torch.inf, torch.nan
    got = rope.run("triton", x, angles.cos(), angles.sin())
    assert torch.equal(got[..., 8:].nan_to_num(7.0), x[..., 8:].nan_to_num(7.0)) and bool(got[..., :8].isfinite().all())


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_write_is_rope_and_append(interleaved: bool) -> None:
    k, v, angles = draw(5, 2, 16), draw(5, 2, 16, seed=1), draw(5, 4, seed=2).repeat(1, 2)
    slots = torch.tensor([3, -1, 0, 9, 4], device=DEVICE)
    caches, wanted = [[torch.zeros(3, 2, 4, 16, device=DEVICE) for _ in range(2)] for _ in range(2)]
    rope_kv_write.run("triton", k, v, angles.cos(), angles.sin(), *caches, slots, interleaved)
    turned = rope.run("triton", k, angles.cos(), angles.sin(), interleaved)
    kv_append.run("triton", turned, v, *wanted, slots)
    same(tuple(caches), tuple(wanted))


def test_adapters_of_a_tile_in_any_order() -> None:
    """A whole tile without an adapter, one of a single adapter, one of many that are far apart."""
    x, a = draw(48, 600, dtype=torch.float16), draw(70, 8, 600, dtype=torch.float16, seed=1) / 25
    adapter = torch.tensor([-1] * 16 + [3] * 16 + [69, 0, 7, 69, -1, 1, 0, 33] * 2, dtype=torch.int64, device=DEVICE)
    got, wanted = lora_shrink.run("triton", x, a, adapter), lora_shrink.meaning(x.double(), a.double(), adapter)
    torch.testing.assert_close(got.double(), wanted, rtol=2e-3, atol=2e-3)
    assert not bool(got[:16].any())
    alone = torch.cat([lora_shrink.run("triton", x[t : t + 1], a, adapter[t : t + 1]) for t in range(48)])
    assert torch.equal(got, alone)


def test_whole_rows_too_wide_for_registers_are_refused() -> None:
    with pytest.raises(ValueError, match="16385 columns under one scale do not fit in registers"):
        silu_mul_quant.run("triton", draw(1, 2 * 16385), torch.int8)


@pytest.mark.parametrize("sections", [None, [4, 6, 6], [0, 16, 0]])
def test_rope_table_takes_its_row_for_each_column(sections: list[int] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(200_000, (5,) if sections is None else (3, 5), generator=generator)
    speeds = 10000.0 ** (-torch.arange(16) / 16)
    for dtype, near in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        got, want = (
            f(positions.to(DEVICE), speeds.to(DEVICE), 1.25, dtype, sections)
            for f in (partial(rope_table.run, "triton"), rope_table.meaning)
        )
        torch.testing.assert_close(got, want, atol=near, rtol=0)
