"""`allreduce_rms_norm`, and quantization of the normed rows: what stands between two quantized GEMMs of a group.

Source: Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3; `quantize` for the scheme.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton
from seamwise.kernels.norm.add_rms_norm_quant import add_rms_norm_quant
from seamwise.kernels.norm.rms_norm import inverse_rms, weighted
from seamwise.kernels.norm.rms_norm_quant import rms_norm_quant
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

from .allreduce_rms_norm import allreduce_rms_norm, normed_sum, one_shot, summed, summed_row
from .collectives import all_reduce, published


@contract(
    args=SCHEME, limits=limits_scheme,
    flops=lambda x_TD, residual_TD: (7 if residual_TD is None else 8) * x_TD.numel(),
)  # fmt: skip
def allreduce_rms_norm_quant(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float, group_name: str, dtype: torch.dtype,
    group: int = 0, scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (*quantize(rms_norm(s, weight, eps), dtype, group, scale), s) with s as in `allreduce_rms_norm`.

    q is (T, D), the scales (T, ⌈D/group⌉) float32; every step rounds as the unfused ops do. Moves at least 2·T·D
    elements between ranks. Raises ValueError as `quantize` does.
    """
    normed_TD, total_TD = normed_sum(all_reduce(x_TD, group_name), residual_TD, weight_D, eps)
    return *quantize.meaning(normed_TD, dtype, group, scale), total_TD


@allreduce_rms_norm_quant.inputs(
    examples=(*quantize.examples, {"T": 3, "D": 33, "group": 16, "residual": False}),
    shapes=rms_norm_quant.shapes,
    sizes={**rms_norm_quant.sizes, "residual": [False, True]},
    rows=(0, 1),
)
def make(
    draw: Draw, T: int, D: int, group: int = 0, int8: bool = False, static: bool = False, **more: Any
) -> tuple[Any, ...]:
    """One rank's inputs."""
    return *allreduce_rms_norm.drawn(draw, T=T, D=D, **more), *scheme(group, int8, static, draw.device)


@triton.jit
def _sum_norm_quant_kernel(
    peers_ptr, residual_ptr, weight_ptr, out_ptr, scale_ptr, static_ptr, total_ptr, residual_stride, D, groups, eps,
    RANKS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr,
    STATIC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    residual_row = residual_ptr + row * residual_stride if residual_ptr is not None else None
    total = summed_row(peers_ptr, residual_row, total_ptr + row * D, row * D, D, RANKS, BLOCK)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0)
    normed = weighted(total, inverse_rms(total, D, eps), weight).to(tl.float32)
    store_quantized(normed, out_ptr + row * D, scale_ptr + row * groups, static_ptr, D, GROUP, BLOCK, LIMIT, STATIC)


allreduce_rms_norm_quant.builds(
    build for ranks in (2, 8) for build in row_builds(
        _sum_norm_quant_kernel, {"peers_ptr": "*i64", "eps": "fp32"}, (7168,), RANKS=ranks
    )
)  # fmt: skip


@allreduce_rms_norm_quant.provider("triton", devices=("cuda",), triton=True, refuses=refuses_group)
def allreduce_rms_norm_quant_triton(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float, group_name: str, dtype: torch.dtype,
    group: int = 0, scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not one_shot(x_TD, group_name):
        return allreduce_rms_norm_quant_collective(x_TD, residual_TD, weight_D, eps, group_name, dtype, group, scale)
    with published(x_TD, group_name) as peers_R:
        return sum_norm_quant(peers_R, x_TD, residual_TD, weight_D, eps, dtype, group, scale)


def sum_norm_quant(
    peers_R: Tensor, x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float, dtype: torch.dtype,
    group: int, scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (q, scale, s) of the ranks' sum of x, whose contiguous copies lie at the addresses `peers`."""
    out, scales = empty_quantized(x_TD, dtype, group)
    total = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    if x_TD.shape[0]:
        _sum_norm_quant_kernel[(x_TD.shape[0],)](
            peers_R, residual_TD, weight_D, out, scales, scale, total,
            residual_TD.stride(0) if residual_TD is not None else 0, x_TD.shape[1], scales.shape[-1], eps,
            RANKS=peers_R.shape[0], **row_config(x_TD.shape[1], dtype, group, scale is not None),
        )  # fmt: skip
    return out, scales, total


@allreduce_rms_norm_quant.provider("collective", strided=True)
def allreduce_rms_norm_quant_collective(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float, group_name: str, *scheme: Any
) -> tuple[Tensor, Tensor, Tensor]:
    sum_TD = summed(x_TD, group_name)
    if residual_TD is not None:
        return add_rms_norm_quant.direct(sum_TD, residual_TD, weight_D, eps, *scheme)
    return *rms_norm_quant.direct(sum_TD, weight_D, eps, *scheme), sum_TD
