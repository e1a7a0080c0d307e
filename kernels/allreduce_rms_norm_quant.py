"""`allreduce_rms_norm`, and quantization of the normed rows: what stands between two quantized GEMMs of a group.

Source: Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3; `quantize` for the scheme.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .add_rms_norm_quant import add_rms_norm_quant
from .allreduce_rms_norm import allreduce_rms_norm, normed_sum, one_shot, refuses_shared, summed, summed_row
from .collectives import all_reduce, published
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
from .rms_norm_quant import rms_norm_quant


@contract()
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


@allreduce_rms_norm_quant.costs
def cost(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float, group_name: str, dtype: torch.dtype,
    group: int = 0, scale: Tensor | None = None,
) -> Cost:  # fmt: skip
    quantized, passes = quantized_cost(x_TD, group), 1 if residual_TD is None else 2
    moved = quantized.bytes + passes * x_TD.nbytes + weight_D.nbytes
    return Cost(bytes=moved, flops=quantized.flops + (passes + 3) * x_TD.numel())


@allreduce_rms_norm_quant.inputs(
    examples=(
        {"T": 1, "D": 16}, {"T": 3, "D": 33, "group": 16, "residual": False}, {"T": 0, "D": 8},
        {"T": 2, "D": 40, "static": True}, {"T": 5, "D": 576, "int8": True},
    ),
    shapes={
        "deepseek-v3 prefill": {"T": 4096, "D": 7168, "group": 128}, "llama-3-70b decode": {"T": 64, "D": 8192},
    },
    sizes={
        "T": (0, 6), "D": (1, 300), "group": [0, 16, 128], "int8": [False, True], "static": [False, True],
        "residual": [False, True], "wide": [False, True],
    },
    rows=(0, 1),
)  # fmt: skip
def make(
    T: int, D: int, group: int = 0, int8: bool = False, static: bool = False, residual: bool = True,
    wide: bool = False, *, dtype: torch.dtype, device: str, seed: int,
) -> tuple[Tensor, Tensor | None, Tensor, float, str, torch.dtype, int, Tensor | None]:  # fmt: skip
    """One rank's inputs; `wide` makes the weight float32, as Gemma's."""
    sizes = {"T": T, "D": D, "residual": residual, "wide": wide}
    args = allreduce_rms_norm.make_inputs(sizes, dtype=dtype, device=device, seed=seed)
    return *args, *scheme(group, int8, static, device)


@triton.jit
def _sum_norm_quant_kernel(
    peers_ptr, residual_ptr, weight_ptr, out_ptr, scale_ptr, static_ptr, total_ptr, residual_stride, D, groups, eps,
    RESIDUAL: tl.constexpr, RANKS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr,
    STATIC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    residual_row = residual_ptr + row * residual_stride if RESIDUAL else None
    total = summed_row(peers_ptr, residual_row, total_ptr + row * D, row * D, D, RANKS, BLOCK)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0)
    normed = weighted(total, inverse_rms(total, D, eps), weight).to(tl.float32)
    store_quantized(normed, out_ptr + row * D, scale_ptr + row * groups, static_ptr, D, GROUP, BLOCK, LIMIT, STATIC)


@allreduce_rms_norm_quant.builds
def builds(dtype: str) -> Iterator[Build]:
    for build in row_builds(_sum_norm_quant_kernel, {"peers_ptr": "*i64", "eps": "fp32"}, (7168,)):
        for ranks in (2, 8):
            constants = {**build.constants, "RESIDUAL": True, "RANKS": ranks}
            yield Build(build.kernel, constants, build.types, build.min_capability)


def _refuses(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float, group_name: str, dtype: torch.dtype,
    group: int = 0, scale: Tensor | None = None,
) -> str | None:  # fmt: skip
    return refuses_shared(x_TD, residual_TD, weight_D, group_name) or refuses_scheme(dtype, group, scale)


@allreduce_rms_norm_quant.provider("triton", devices=("cuda",), refuses=_refuses, triton=True)
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
            RESIDUAL=residual_TD is not None, RANKS=peers_R.shape[0],
            **row_config(x_TD.shape[1], dtype, group, scale is not None),
        )  # fmt: skip
    return out, scales, total


@allreduce_rms_norm_quant.provider("collective")
def allreduce_rms_norm_quant_collective(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float, group_name: str, dtype: torch.dtype,
    group: int = 0, scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sum_TD = summed(x_TD, group_name)
    rest = weight_D, eps, dtype, group, scale
    if residual_TD is not None:
        return add_rms_norm_quant.direct(sum_TD, residual_TD, *rest)
    return *rms_norm_quant.direct(sum_TD, *rest), sum_TD
