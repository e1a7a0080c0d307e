"""RMSNorm and quantization of the normed rows, in one pass over memory.

Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467; `quantize` for the scheme.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, contract, rows_of
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton
from seamwise.kernels.quant.quantize import (
    SCHEME,
    empty_quantized,
    limits_scheme,
    quantize,
    refuses_group,
    row_builds,
    row_config,
    scheme,
    store_quantized,
)

from .rms_norm import inverse_rms, norm_weight, rms_norm, row_total, weighted


@contract(args={"x_TD": "*T D", **SCHEME}, limits=limits_scheme, flops=lambda x_TD: 7 * x_TD.numel())
def rms_norm_quant(
    x_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype, group: int = 0, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return quantize(rms_norm(x, weight, eps), dtype, group, scale): q (T, D) and scales (T, ⌈D/group⌉) float32.

    The normed rows are rounded to x's dtype before they are quantized, so fused equals unfused. Moves T·D + D elements,
    T·D bytes and the scales. Raises ValueError as `quantize` does.
    """
    return quantize.meaning(rms_norm.meaning(x_TD, weight_D, eps), dtype, group, scale)


@rms_norm_quant.inputs(
    examples=quantize.examples,
    shapes={
        "deepseek-v3 prefill": {"T": 4096, "D": 7168, "group": 128}, "llama-3-70b decode": {"T": 64, "D": 8192},
    },
    sizes={**quantize.sizes, "wide": [False, True]},
    rows=(0,),
)  # fmt: skip
def make(
    draw: Draw, T: int, D: int, group: int = 0, int8: bool = False, static: bool = False, wide: bool = False
) -> tuple[Any, ...]:
    return draw(T, D), norm_weight(draw, D, wide), 1e-5, *scheme(group, int8, static, draw.device)


@triton.jit
def _rms_norm_quant_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, scale_ptr, static_ptr, total_ptr, x_stride, residual_stride, D, groups,
    eps, GROUP: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    residual_at = residual_ptr + row * residual_stride if residual_ptr is not None else None
    total_at = total_ptr + row * D if total_ptr is not None else None
    total = row_total(x_ptr + row * x_stride, residual_at, total_at, column, D)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0)
    normed = weighted(total, inverse_rms(total, D, eps), weight).to(tl.float32)
    store_quantized(normed, out_ptr + row * D, scale_ptr + row * groups, static_ptr, D, GROUP, BLOCK, LIMIT, STATIC)


def norm_quant_builds(**constants: Any) -> Iterator[Build]:
    """Yield the kernel's builds, with None for the pointers that are not in use."""
    return row_builds(_rms_norm_quant_kernel, {"eps": "fp32"}, **constants)


rms_norm_quant.builds(norm_quant_builds(residual_ptr=None, total_ptr=None))


def launch_norm_quant(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float, dtype: torch.dtype, group: int = 0,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (*quantize(rms_norm(s), …), s) with s = x, + residual where given."""
    (rows, x_stride), width = rows_of(x_TD), x_TD.shape[-1]
    residual_stride = 0 if residual_TD is None else rows_of(residual_TD)[1]
    out, scales = empty_quantized(x_TD, dtype, group)
    total = None if residual_TD is None else torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    if rows:
        _rms_norm_quant_kernel[(rows,)](
            x_TD, residual_TD, weight_D, out, scales, scale, total, x_stride, residual_stride, width, scales.shape[-1],
            eps, **row_config(width, dtype, group, scale is not None),
        )  # fmt: skip
    return out, scales, x_TD if total is None else total


@rms_norm_quant.provider("triton", devices=("cuda",), refuses=refuses_group, triton=True)
def rms_norm_quant_triton(x_TD: Tensor, weight_D: Tensor, eps: float, *scheme: Any) -> tuple[Tensor, Tensor]:
    return launch_norm_quant(x_TD, None, weight_D, eps, *scheme)[:2]


@rms_norm_quant.provider("composed", devices=("cpu", "cuda"), strided=True, launches=True, composed=True)
def rms_norm_quant_composed(x_TD: Tensor, weight_D: Tensor, eps: float, *scheme: Any) -> tuple[Tensor, Tensor]:
    """The two ops by their own kernels."""
    return quantize(rms_norm.direct(x_TD, weight_D, eps), *scheme)
