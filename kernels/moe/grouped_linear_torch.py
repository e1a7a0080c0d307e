"""The providers of the grouped linear layers that torch brings: torch._grouped_mm and torch._scaled_grouped_mm.

Both take rows sorted by expert, so that x is gathered before and the results are scattered to their slots after: that
costs two copies of the rows, and `tuned_by` says where the library's GEMM earns them. Nothing here waits for the GPU.
What is refused is what torch refuses, in torch 2.11 to 2.13: https://github.com/pytorch/pytorch, GroupedBlas.cpp in
aten/src/ATen/native/cuda; biases, which it has not; and GPUs where it falls back to a loop that waits for the sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.linear.scaled_linear import gpu_before

from .grouped_linear import grouped_linear
from .grouped_scaled_linear import grouped_scaled_linear


def _refuses(
    x_RK: Tensor, weight_ENK: Tensor, bias_EN: Tensor | None, *, dtype: torch.dtype = torch.bfloat16
) -> str | None:
    (E, N, K), step = weight_ENK.shape, 16 // dtype.itemsize
    if x_RK.dtype != dtype or weight_ENK.dtype != dtype:
        return f"x and weight must be {dtype}, got {x_RK.dtype} and {weight_ENK.dtype}"
    if bias_EN is not None:
        return "torch's grouped products take no bias"
    if not weight_ENK.is_contiguous() or K % step or N % step or not E * N * K:
        return f"weights must be contiguous, N and K in multiples of {step}, got {E, N, K}, {weight_ENK.stride()}"
    return "it needs compute capability 9.0" if gpu_before(9) else None


def _refuses_scaled(
    x_RK: Tensor, x_scale_RG: Tensor, weight_ENK: Tensor, w_scale: Tensor, dtype: torch.dtype, bias_EN: Tensor | None
) -> str | None:
    if x_scale_RG.shape[1] != 1 or w_scale.shape[1:] not in ((1, 1), (weight_ENK.shape[1], 1)):
        return f"wanted one scale a row, got {tuple(x_scale_RG.shape)} for x, {tuple(w_scale.shape)} for weights"
    if dtype != torch.bfloat16:
        return f"wanted a bfloat16 result, got {dtype}"
    if not gpu_before(10):
        return "it needs Hopper"
    return _refuses(x_RK, weight_ENK, bias_EN, dtype=torch.float8_e4m3fn)


@grouped_linear.tuned_by
def key(x_RK: Tensor, weight_ENK: Tensor, top_k: int) -> tuple[int, ...]:
    """Return (R, top_k, E, N, K)."""
    return x_RK.shape[0], top_k, *weight_ENK.shape


@grouped_scaled_linear.tuned_by
def scaled_key(x_RK: Tensor, x_scale_RG: Tensor, weight_ENK: Tensor, w_scale: Tensor, top_k: int) -> tuple[Any, ...]:
    """Return (R, top_k, E, N, K, kind), the kind as `scaled_linear`'s."""
    blocks = " blocks" if x_scale_RG.shape[1] > 1 or w_scale.shape[-1] > 1 else ""
    return x_RK.shape[0], top_k, *weight_ENK.shape, str(x_RK.dtype).removeprefix("torch.") + blocks


def _scatter(y_SN: Tensor, slots_S: Tensor, starts_E: Tensor) -> Tensor:
    """Return sorted rows at their slots; the rows behind the last expert's, which torch leaves unwritten, as zeros."""
    written_S = torch.arange(slots_S.shape[0], device=y_SN.device) < starts_E[-1]
    return torch.empty_like(y_SN).index_copy_(0, slots_S, torch.where(written_S[:, None], y_SN, 0))


@grouped_linear.provider("torch_grouped_mm", devices=("cuda",), refuses=_refuses)
def grouped_linear_torch(
    x_RK: Tensor, weight_ENK: Tensor, order_S: Tensor, starts_E: Tensor, top_k: int, bias_EN: Tensor | None = None
) -> Tensor:
    slots_S = order_S.long()
    if not len(slots_S):
        return x_RK.new_empty(0, weight_ENK.shape[1])
    y_SN = torch._grouped_mm(x_RK.index_select(0, slots_S // top_k), weight_ENK.mT, offs=starts_E[1:])
    return _scatter(y_SN, slots_S, starts_E)


@grouped_scaled_linear.provider("torch_grouped_mm", devices=("cuda",), refuses=_refuses_scaled)
def grouped_scaled_linear_torch(
    x_RK: Tensor, x_scale_RG: Tensor, weight_ENK: Tensor, w_scale: Tensor, order_S: Tensor, starts_E: Tensor,
    top_k: int, dtype: torch.dtype, bias_EN: Tensor | None = None,
) -> Tensor:  # fmt: skip
    slots_S, (E, N, _) = order_S.long(), weight_ENK.shape
    if not len(slots_S):
        return x_RK.new_empty(0, N, dtype=dtype)
    x_SK = x_RK.view(torch.uint8).index_select(0, slots_S // top_k).view(x_RK.dtype)
    x_scale_S, w_scale_EN = x_scale_RG[:, 0].index_select(0, slots_S // top_k), w_scale[..., 0].expand(E, N)
    y_SN = torch._scaled_grouped_mm(
        x_SK, weight_ENK.mT, x_scale_S, w_scale_EN.contiguous(), offs=starts_E[1:], out_dtype=dtype
    )
    return _scatter(y_SN, slots_S, starts_E)
