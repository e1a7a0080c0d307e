"""The CPU providers of the row-wise ops, in C++ (tokenwise_cpu.cpp): float32 and bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from seamwise.kernels.activation.silu_mul import silu_mul
from seamwise.kernels.contract import rows_of
from seamwise.kernels.linear.gather_rows import gather_rows
from seamwise.kernels.norm.add_rms_norm import add_rms_norm
from seamwise.kernels.norm.rms_norm import rms_norm
from seamwise.kernels.position.rope import refuses_rope, rope
from seamwise.kernels.position.rope_table import rope_table
from seamwise.kernels.quant.quantize import quantize
from seamwise.kernels.signature import cdiv

from .dtypes import DTYPES, one_dtype
from .tape import Kernel, empty, launch

_FLAGS = ("-ffp-contract=off",)  # products and sums round apart, as torch's do


def _kernel(op: str) -> Kernel:
    return Kernel("tokenwise_cpu.cpp", f"seamwise_{op}", extra=_FLAGS)


_NORM, _ROPE, _SILU_MUL, _QUANTIZE = map(_kernel, ("norm", "rope", "silu_mul", "quantize"))
_ROPE_TABLE, _GATHER, _ARGMAX = map(_kernel, ("rope_table", "gather", "argmax"))


def _norm(x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    (rows, stride), (_, residual_stride) = rows_of(x_TD), rows_of(x_TD if residual_TD is None else residual_TD)
    out, total = empty(x_TD.shape, x_TD.dtype), x_TD if residual_TD is None else empty(x_TD.shape, x_TD.dtype)
    launch(
        _NORM, DTYPES[x_TD.dtype], x_TD.data_ptr(), 0 if residual_TD is None else residual_TD.data_ptr(),
        weight_D.data_ptr(), out.data_ptr(), total.data_ptr(), rows, x_TD.shape[-1], stride, residual_stride,
        float(eps), torch.get_num_threads(),
    )  # fmt: skip
    return out, total


@rms_norm.provider("cpp", devices=("cpu",), refuses=lambda x_TD, weight_D: one_dtype(x_TD, weight_D), launches=True)
def rms_norm_cpp(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return _norm(x_TD, None, weight_D, eps)[0]


@add_rms_norm.provider(
    "cpp", devices=("cpu",), launches=True,
    refuses=lambda x_TD, residual_TD, weight_D: one_dtype(x_TD, residual_TD, weight_D),
)  # fmt: skip
def add_rms_norm_cpp(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _norm(x_TD, residual_TD, weight_D, eps)


@quantize.provider("cpp", devices=("cpu",), refuses=lambda x_TD: one_dtype(x_TD), launches=True)
def quantize_cpp(
    x_TD: Tensor, dtype: torch.dtype, group: int = 0, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    (rows, stride), width = rows_of(x_TD), x_TD.shape[-1]
    out, scales = empty(x_TD.shape, dtype), empty((*x_TD.shape[:-1], cdiv(width, group or width)), torch.float32)
    launch(
        _QUANTIZE, DTYPES[x_TD.dtype], int(dtype == torch.int8), x_TD.data_ptr(), out.data_ptr(), scales.data_ptr(),
        0 if scale is None else scale.data_ptr(), rows, width, group or width, stride, torch.get_num_threads(),
    )  # fmt: skip
    return out, scales


def _refuses_rope(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool) -> str | None:
    if interleaved or cos_TR.shape[-1] != x_THD.shape[-1]:
        return f"it turns whole heads in halves, got {cos_TR.shape[-1]} of {x_THD.shape[-1]} columns, {interleaved=}"
    return refuses_rope(x_THD) or one_dtype(x_THD, cos_TR, sin_TR)


@rope.provider("cpp", devices=("cpu",), refuses=_refuses_rope, launches=True)
def rope_cpp(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool = False) -> Tensor:
    out = empty(x_THD.shape, x_THD.dtype)
    launch(
        _ROPE, DTYPES[x_THD.dtype], x_THD.data_ptr(), cos_TR.data_ptr(), sin_TR.data_ptr(), out.data_ptr(),
        *x_THD.shape, *x_THD.stride()[:2], cos_TR.stride(0), sin_TR.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _refuses_rope_table(positions_T: Tensor, dtype: torch.dtype, sections: list[int] | None) -> str | None:
    if sections is not None:
        return f"it takes one position a token, got sections {sections}"
    if dtype not in DTYPES:
        return f"dtype must be float32 or bfloat16, got {dtype}"
    return None if positions_T.dim() == 1 else f"positions must be a vector, got {tuple(positions_T.shape)}"


@rope_table.provider("cpp", devices=("cpu",), refuses=_refuses_rope_table, launches=True)
def rope_table_cpp(
    positions_T: Tensor, speeds_F: Tensor, scaling: float, dtype: torch.dtype, sections: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    tokens, speeds = positions_T.shape[0], speeds_F.shape[0]
    cos, sin = empty((tokens, 2 * speeds), dtype), empty((tokens, 2 * speeds), dtype)
    launch(
        _ROPE_TABLE, DTYPES[dtype], positions_T.data_ptr(), speeds_F.data_ptr(), cos.data_ptr(), sin.data_ptr(),
        tokens, speeds, float(scaling), torch.get_num_threads(),
    )  # fmt: skip
    return cos, sin


@silu_mul.provider("cpp", devices=("cpu",), refuses=lambda x_TI2: one_dtype(x_TI2), launches=True)
def silu_mul_cpp(x_TI2: Tensor) -> Tensor:
    (rows, stride), width = rows_of(x_TI2), x_TI2.shape[-1] // 2
    out = empty((*x_TI2.shape[:-1], width), x_TI2.dtype)
    launch(
        _SILU_MUL, DTYPES[x_TI2.dtype], x_TI2.data_ptr(), out.data_ptr(), rows, width, stride, torch.get_num_threads(),
    )  # fmt: skip
    return out


@gather_rows.provider("cpp", devices=("cpu",), launches=True)
def gather_rows_cpp(table_VD: Tensor, index_T: Tensor) -> Tensor:
    """Copy rows in C++. Raises ValueError when an index lies outside the table."""
    out = empty((*index_T.shape, table_VD.shape[1]), table_VD.dtype)
    size = table_VD.element_size()
    wrong = launch(
        _GATHER, index_T.data_ptr(), table_VD.data_ptr(), out.data_ptr(), index_T.numel(), table_VD.shape[0],
        table_VD.shape[1] * size, table_VD.stride(0) * size, torch.get_num_threads(),
    )  # fmt: skip
    if wrong:
        raise ValueError(f"gather_rows: index {int(index_T.flatten()[wrong - 1])}, wanted 0 to {table_VD.shape[0] - 1}")
    return out


def argmax_rows(x_RV: Tensor) -> Tensor:
    """Return what torch.argmax does, the first greatest of each row, int64 (R,), a NaN above all."""
    if x_RV.dtype not in DTYPES or x_RV.stride(1) != 1 or not x_RV.shape[1]:
        return x_RV.argmax(-1)
    out = empty(x_RV.shape[:1], torch.int64)
    launch(
        _ARGMAX, DTYPES[x_RV.dtype], x_RV.data_ptr(), out.data_ptr(), *x_RV.shape, x_RV.stride(0),
        torch.get_num_threads(),
    )  # fmt: skip
    return out
