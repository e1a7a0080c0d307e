"""The CPU providers of packed linear layers, in C++ (linear_cpu.cpp): float32 and bfloat16; the call for all kinds."""

from __future__ import annotations

import torch
from torch import Tensor

from seamwise.kernels.contract import rows_of
from seamwise.kernels.linear.linear import linear_packed, pack_linear, packed_shape

from . import huge_pages
from .dtypes import one_dtype
from .tape import Kernel, empty, launch

_PACK = Kernel("linear_cpu.cpp", "seamwise_pack_linear")
_LINEAR = Kernel("linear_cpu.cpp", "seamwise_linear")
# Of packed weights, the number that the kernel knows their words by; uint8 are two int4.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2, torch.int8: 3, torch.float8_e4m3fn: 4}


def launch_linear(
    x: Tensor, packed: Tensor, out: Tensor, bias: Tensor | None = None, group: int = 0,
    scales: tuple[Tensor | None, ...] = (None, None, None), order: Tensor | None = None, starts: Tensor | None = None,
    top_k: int = 1,
) -> Tensor:  # fmt: skip
    """Return `out` (…, N), written by the kernel; scales: those of weights, their offsets, those of x's rows."""
    (rows, stride), depth = rows_of(x), x.shape[-1]
    launch(
        _LINEAR, KINDS[packed.dtype], x.data_ptr(), packed.data_ptr(), 0 if bias is None else bias.data_ptr(),
        out.data_ptr(), rows if order is None else order.shape[0], out.shape[-1], depth, stride * x.element_size(),
        (out.stride(-2) if out.dim() > 1 else 0) * out.element_size(), int(out.dtype == torch.float32),
        group or depth + depth % 2, *(0 if t is None else t.data_ptr() for t in scales[:1]),
        0 if scales[0] is None else scales[0].shape[2],
        *(0 if t is None else t.data_ptr() for t in (*scales[1:], order, starts)),
        0 if starts is None else starts.shape[0] - 1, top_k, torch.get_num_threads(),
    )  # fmt: skip
    return out


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
    return launch_linear(x_TK, packed, empty((*x_TK.shape[:-1], out_features), x_TK.dtype), bias_N)
