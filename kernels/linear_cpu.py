"""The CPU provider of packed linear layers, in C++ (linear_cpu.cpp): bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from . import huge_pages
from .linear import PANEL, linear_packed, pack_linear
from .tape import Kernel, empty, launch

_PACK = Kernel("linear_cpu.cpp", "seamwise_pack_linear")
_LINEAR = Kernel("linear_cpu.cpp", "seamwise_linear")


def _refuses_pack(weight_NK: Tensor) -> str | None:
    if weight_NK.dtype != torch.bfloat16 or weight_NK.dim() != 2 or weight_NK.stride(1) != 1:
        return f"weight must be bfloat16 (N, K), contiguous in K, got {weight_NK.dtype} {tuple(weight_NK.shape)}"
    return None


@pack_linear.provider("cpp", devices=("cpu",), refuses=_refuses_pack)
def pack_linear_cpp(weight_NK: Tensor) -> Tensor:
    rows, columns = weight_NK.shape
    packed = huge_pages.empty((-(-rows // PANEL), (columns + 1) // 2, PANEL, 2), weight_NK.dtype)
    launch(_PACK, weight_NK.data_ptr(), packed.data_ptr(), rows, columns, weight_NK.stride(0), torch.get_num_threads())
    return packed


def _refuses(x_TK: Tensor, packed: Tensor, out_features: int, bias_N: Tensor | None = None) -> str | None:
    if x_TK.dtype != torch.bfloat16 or packed.dtype != torch.bfloat16:
        return f"x and packed must be bfloat16, got {x_TK.dtype}, {packed.dtype}"
    if x_TK.stride(-1) != 1 or x_TK.dim() < 2 or (x_TK.dim() > 2 and not x_TK.is_contiguous()):
        return f"x must be rows contiguous in K, got {tuple(x_TK.shape)}, strides {x_TK.stride()}"
    depth = x_TK.shape[-1]
    wanted = (-(-out_features // PANEL), (depth + 1) // 2, PANEL, 2)
    if depth == 0 or tuple(packed.shape) != wanted or not packed.is_contiguous():
        sizes = f"{depth} inputs and {out_features} outputs"
        return f"packed must be contiguous {wanted} for {sizes}, got {tuple(packed.shape)}"
    if bias_N is not None and (
        bias_N.dtype != torch.bfloat16 or bias_N.shape != (out_features,) or bias_N.stride(0) != 1
    ):
        return f"bias must be bfloat16 ({out_features},), contiguous, got {bias_N.dtype} {tuple(bias_N.shape)}"
    return None


@linear_packed.provider("cpp", devices=("cpu",), refuses=_refuses)
def linear_packed_cpp(x_TK: Tensor, packed: Tensor, out_features: int, bias_N: Tensor | None = None) -> Tensor:
    columns = x_TK.shape[-1]
    rows = x_TK.numel() // columns
    out = empty((*x_TK.shape[:-1], out_features), torch.bfloat16)
    launch(
        _LINEAR, x_TK.data_ptr(), packed.data_ptr(), 0 if bias_N is None else bias_N.data_ptr(), out.data_ptr(),
        rows, out_features, columns, x_TK.stride(-2), out_features, torch.get_num_threads(),
    )  # fmt: skip
    return out
