"""The CPU provider of packed linear layers, in C++ (linear_cpu.cpp): float32 and bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from seamwise.kernels.contract import rows_of
from seamwise.kernels.linear.linear import linear_packed, pack_linear, packed_shape

from . import huge_pages
from .dtypes import DTYPES, one_dtype
from .tape import Kernel, empty, launch

_PACK = Kernel("linear_cpu.cpp", "seamwise_pack_linear")
_LINEAR = Kernel("linear_cpu.cpp", "seamwise_linear")


@pack_linear.provider("cpp", devices=("cpu",), refuses=lambda weight_NK: one_dtype(weight_NK), launches=True)
def pack_linear_cpp(weight_NK: Tensor) -> Tensor:
    rows, columns = weight_NK.shape
    size = weight_NK.element_size()
    packed = huge_pages.empty(packed_shape(rows, columns, weight_NK.dtype), weight_NK.dtype)
    launch(
        _PACK, weight_NK.data_ptr(), packed.data_ptr(), size, rows, columns, weight_NK.stride(0) * size,
        torch.get_num_threads(),
    )  # fmt: skip
    return packed


@linear_packed.provider(
    "cpp", devices=("cpu",), refuses=lambda x_TK, packed, bias_N: one_dtype(x_TK, packed, bias_N), launches=True
)
def linear_packed_cpp(x_TK: Tensor, packed: Tensor, out_features: int, bias_N: Tensor | None = None) -> Tensor:
    (rows, stride), depth, size = rows_of(x_TK), x_TK.shape[-1], x_TK.element_size()
    out = empty((*x_TK.shape[:-1], out_features), x_TK.dtype)
    launch(
        _LINEAR, DTYPES[x_TK.dtype], x_TK.data_ptr(), packed.data_ptr(), 0 if bias_N is None else bias_N.data_ptr(),
        out.data_ptr(), rows, out_features, depth, stride * size, out_features * size,
        torch.get_num_threads(),
    )  # fmt: skip
    return out
