"""Residual addition, RMSNorm of the sum, and quantization of the normed rows, in one pass over memory.

Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467; `quantize` for the scheme.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .add_rms_norm import add_rms_norm, refuses_add_norm
from .contract import Build, Cost, contract
from .quantize import (
    empty_quantized,
    quantize,
    quantized_cost,
    refuses_scheme,
    row_builds,
    row_config,
    scheme,
    store_quantized,
)
from .rms_norm import inverse_rms, weighted
from .tape import call


@contract()
def add_rms_norm_quant(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype, group: int = 0,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (*quantize(rms_norm(s, weight, eps), dtype, group, scale), s) with s = x + residual in x's dtype.

    q is (T, D), the scales (T, ⌈D/group⌉) float32; every step rounds as the unfused ops do. Moves 3·T·D + D elements,
    T·D bytes and the scales. Raises ValueError as `quantize` does.
    """
    normed_TD, total_TD = add_rms_norm.meaning(x_TD, residual_TD, weight_D, eps)
    return *quantize.meaning(normed_TD, dtype, group, scale), total_TD


@add_rms_norm_quant.costs
def cost(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype, group: int = 0,
    scale: Tensor | None = None,
) -> Cost:  # fmt: skip
    quantized = quantized_cost(x_TD, group)
    return Cost(bytes=quantized.bytes + 2 * x_TD.nbytes + weight_D.nbytes, flops=quantized.flops + 5 * x_TD.numel())


@add_rms_norm_quant.inputs(
    examples=(
        {"T": 1, "D": 16}, {"T": 3, "D": 33, "group": 16}, {"T": 0, "D": 8}, {"T": 2, "D": 40, "static": True},
        {"T": 5, "D": 576, "int8": True},
    ),
    shapes={
        "deepseek-v3 prefill": {"T": 4096, "D": 7168, "group": 128}, "llama-3-70b decode": {"T": 64, "D": 8192},
    },
    sizes={
        "T": (0, 6), "D": (1, 300), "group": [0, 16, 128], "int8": [False, True], "static": [False, True],
        "wide": [False, True],
    },
    rows=(0, 1),
)  # fmt: skip
def make(
    T: int, D: int, group: int = 0, int8: bool = False, static: bool = False, wide: bool = False, *,
    dtype: torch.dtype, device: str, seed: int,
) -> tuple[Tensor, Tensor, Tensor, float, torch.dtype, int, Tensor | None]:  # fmt: skip
    """`wide` makes the weight float32, as Gemma's."""
    generator = torch.Generator(device).manual_seed(seed)
    x_TD, residual_TD = (torch.randn(T, D, generator=generator, device=device).to(dtype) for _ in range(2))
    weight_D = 1 + 0.1 * torch.randn(D, generator=generator, device=device)
    return x_TD, residual_TD, weight_D if wide else weight_D.to(dtype), 1e-5, *scheme(group, int8, static, device)


@triton.jit
def _add_rms_norm_quant_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, scale_ptr, static_ptr, total_ptr, x_stride, residual_stride, D, groups,
    eps, GROUP: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < D
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    residual = tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0)
    total = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
    tl.store(total_ptr + row * D + column, total, mask=inside)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    normed = weighted(total, inverse_rms(total, D, eps), weight).to(tl.float32)
    store_quantized(normed, out_ptr + row * D, scale_ptr + row * groups, static_ptr, D, GROUP, BLOCK, LIMIT, STATIC)


@add_rms_norm_quant.builds
def builds(dtype: str) -> Iterator[Build]:
    return row_builds(_add_rms_norm_quant_kernel, {"eps": "fp32"})


def _refuses(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype, group: int = 0,
    scale: Tensor | None = None,
) -> str | None:  # fmt: skip
    return refuses_add_norm(x_TD, residual_TD, weight_D, eps) or refuses_scheme(dtype, group, scale)


@add_rms_norm_quant.provider("triton", devices=("cuda",), refuses=_refuses, triton=True)
def add_rms_norm_quant_triton(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype, group: int = 0,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    width = x_TD.shape[-1]
    out, scales = empty_quantized(x_TD, dtype, group)
    total = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    if rows := x_TD.numel() // width:
        _add_rms_norm_quant_kernel[(rows,)](
            x_TD, residual_TD, weight_D, out, scales, scale, total, x_TD.stride(-2), residual_TD.stride(-2), width,
            scales.shape[-1], eps, **row_config(width, dtype, group, scale is not None),
        )  # fmt: skip
    return out, scales, total


@add_rms_norm_quant.provider("composed", devices=("cpu",))
def add_rms_norm_quant_composed(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype, group: int = 0,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The norm by its own kernel, then quantize's meaning, which has none here."""
    normed_TD, total_TD = add_rms_norm.direct(x_TD, residual_TD, weight_D, eps)
    return *call(quantize.meaning, normed_TD, dtype, group, scale), total_TD
