"""The CPU provider of packed linear layers, in C++ (linear_cpu.cpp): float32 and bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from seamwise.kernels.contract import rows_of
from seamwise.kernels.linear.linear import linear_packed, pack_linear, packed_shape

from . import huge_pages
from .tape import Kernel, empty, launch

_PACK = Kernel("linear_cpu.cpp", "seamwise_pack_linear")
_LINEAR = Kernel("linear_cpu.cpp", "seamwise_linear")


_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def _refuses_pack(weight_NK: Tensor) -> str | None:
    return None if weight_NK.dtype in _DTYPES else f"weight must be float32 or bfloat16, got {weight_NK.dtype}"


@pack_linear.provider("cpp", devices=("cpu",), refuses=_refuses_pack, launches=True)
def pack_linear_cpp(weight_NK: Tensor) -> Tensor:
    rows, columns = weight_NK.shape
    size = weight_NK.element_size()
    packed = huge_pages.empty(packed_shape(rows, columns, weight_NK.dtype), weight_NK.dtype)
    launch(
        _PACK, weight_NK.data_ptr(), packed.data_ptr(), size, rows, columns, weight_NK.stride(0) * size,
        torch.get_num_threads(),
    )  # fmt: skip
    return packed


def _refuses(x_TK: Tensor, packed: Tensor, bias_N: Tensor | None = None) -> str | None:
    dtypes = [t.dtype for t in (x_TK, packed, bias_N) if t is not None]
    if x_TK.dtype not in _DTYPES or len(set(dtypes)) > 1:
        return f"x, packed and bias must all be float32 or all bfloat16, got {', '.join(map(str, dtypes))}"
    return None


@linear_packed.provider("cpp", devices=("cpu",), refuses=_refuses, launches=True)
def linear_packed_cpp(x_TK: Tensor, packed: Tensor, out_features: int, bias_N: Tensor | None = None) -> Tensor:
    (rows, stride), depth, size = rows_of(x_TK), x_TK.shape[-1], x_TK.element_size()
    out = empty((*x_TK.shape[:-1], out_features), x_TK.dtype)
    launch(
        _LINEAR, _DTYPES[x_TK.dtype], x_TK.data_ptr(), packed.data_ptr(), 0 if bias_N is None else bias_N.data_ptr(),
        out.data_ptr(), rows, out_features, depth, stride * size, out_features * size,
        torch.get_num_threads(),
    )  # fmt: skip
    return out
