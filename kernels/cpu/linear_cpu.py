"""The CPU provider of packed linear layers, in C++ (linear_cpu.cpp): float32 and bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from seamwise.kernels.linear.linear import linear_packed, pack_linear, packed_shape

from . import huge_pages
from .tape import Kernel, empty, launch

_PACK = Kernel("linear_cpu.cpp", "seamwise_pack_linear")
_LINEAR = Kernel("linear_cpu.cpp", "seamwise_linear")


_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def _refuses_pack(weight_NK: Tensor) -> str | None:
    if weight_NK.dtype not in _DTYPES or weight_NK.dim() != 2 or weight_NK.stride(1) != 1:
        got = f"{weight_NK.dtype} {tuple(weight_NK.shape)}, strides {weight_NK.stride()}"
        return f"weight must be float32 or bfloat16 (N, K), contiguous in K, got {got}"
    return None


@pack_linear.provider("cpp", devices=("cpu",), refuses=_refuses_pack)
def pack_linear_cpp(weight_NK: Tensor) -> Tensor:
    rows, columns = weight_NK.shape
    size = weight_NK.element_size()
    packed = huge_pages.empty(packed_shape(rows, columns, weight_NK.dtype), weight_NK.dtype)
    launch(
        _PACK, weight_NK.data_ptr(), packed.data_ptr(), size, rows, columns, weight_NK.stride(0) * size,
        torch.get_num_threads(),
    )  # fmt: skip
    return packed


def _refuses(x_TK: Tensor, packed: Tensor, out_features: int, bias_N: Tensor | None = None) -> str | None:
    if x_TK.dtype not in _DTYPES or packed.dtype != x_TK.dtype:
        return f"x and packed must both be float32 or both bfloat16, got {x_TK.dtype}, {packed.dtype}"
    if x_TK.stride(-1) != 1 or x_TK.dim() < 2 or (x_TK.dim() > 2 and not x_TK.is_contiguous()):
        return f"x must be rows contiguous in K, got {tuple(x_TK.shape)}, strides {x_TK.stride()}"
    depth = x_TK.shape[-1]
    wanted = packed_shape(out_features, depth, x_TK.dtype)
    if depth == 0 or tuple(packed.shape) != wanted or not packed.is_contiguous():
        sizes = f"{depth} inputs and {out_features} outputs"
        return f"packed must be contiguous {wanted} for {sizes}, got {tuple(packed.shape)}"
    if bias_N is not None and (bias_N.dtype != x_TK.dtype or bias_N.shape != (out_features,) or bias_N.stride(0) != 1):
        return f"bias must be {x_TK.dtype} ({out_features},), contiguous, got {bias_N.dtype} {tuple(bias_N.shape)}"
    return None


@linear_packed.provider("cpp", devices=("cpu",), refuses=_refuses)
def linear_packed_cpp(x_TK: Tensor, packed: Tensor, out_features: int, bias_N: Tensor | None = None) -> Tensor:
    depth, size = x_TK.shape[-1], x_TK.element_size()
    out = empty((*x_TK.shape[:-1], out_features), x_TK.dtype)
    launch(
        _LINEAR, _DTYPES[x_TK.dtype], x_TK.data_ptr(), packed.data_ptr(), 0 if bias_N is None else bias_N.data_ptr(),
        out.data_ptr(), x_TK.numel() // depth, out_features, depth, x_TK.stride(-2) * size, out_features * size,
        torch.get_num_threads(),
    )  # fmt: skip
    return out
