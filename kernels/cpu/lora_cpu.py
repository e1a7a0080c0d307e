"""The CPU providers of LoRA's two products, in C++ (lora_cpu.cpp): float32 and bfloat16."""

from __future__ import annotations

from array import array
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from seamwise.kernels.linear.lora import lora_expand, lora_shrink

from .dtypes import DTYPES, one_dtype
from .tape import Kernel, empty, launch

_SHRINK = Kernel("lora_cpu.cpp", "seamwise_lora_shrink")
_EXPAND = Kernel("lora_cpu.cpp", "seamwise_lora_expand")


@lora_shrink.provider("cpp", devices=("cpu",), refuses=lambda x_TD, a_LRD: one_dtype(x_TD, a_LRD), launches=True)
def lora_shrink_cpp(x_TD: Tensor, a_LRD: Tensor, adapter_T: Tensor) -> Tensor:
    (tokens, width), (adapters, rank, _) = x_TD.shape, a_LRD.shape
    if not adapter_T.shape[0]:
        return empty((0, rank), x_TD.dtype)
    out = empty((tokens, rank), x_TD.dtype)
    wrong = launch(
        _SHRINK, DTYPES[x_TD.dtype], int(adapter_T.dtype == torch.int64), x_TD.data_ptr(), a_LRD.data_ptr(),
        adapter_T.data_ptr(), out.data_ptr(), tokens, width, rank, adapters, x_TD.stride(0) * x_TD.element_size(),
        torch.get_num_threads(),
    )  # fmt: skip
    _check("lora_shrink", adapter_T, adapters, wrong)
    return out


@lora_expand.provider(
    "cpp", devices=("cpu",), refuses=lambda y_TN, s_TS, b_LRN: one_dtype(y_TN, s_TS, b_LRN), launches=True
)
def lora_expand_cpp(
    y_TN: Tensor, s_TS: Tensor, b_LRN: Tensor, adapter_T: Tensor, scaling_LP: Tensor, widths: list[int]
) -> Tensor:
    if not adapter_T.shape[0]:
        return y_TN
    (tokens, width), (adapters, rank, _) = y_TN.shape, b_LRN.shape
    out, size = empty((tokens, width), y_TN.dtype), y_TN.element_size()
    wrong = launch(
        _EXPAND, DTYPES[y_TN.dtype], int(adapter_T.dtype == torch.int64), y_TN.data_ptr(), s_TS.data_ptr(),
        b_LRN.data_ptr(), adapter_T.data_ptr(), scaling_LP.data_ptr(), _ends(tuple(widths)).buffer_info()[0],
        out.data_ptr(), tokens, rank, width, adapters, len(widths), y_TN.stride(0) * size, s_TS.stride(0) * size,
        torch.get_num_threads(),
    )  # fmt: skip
    _check("lora_expand", adapter_T, adapters, wrong)
    return out


@cache
def _ends(widths: tuple[int, ...]) -> array[int]:
    """Return where slices end; kept for ever, for tapes hold its address: a tensor would be of a recording's pool."""
    return array("q", accumulate(widths))


def _check(op: str, adapter_T: Tensor, adapters: int, wrong: int) -> None:
    if wrong:
        raise ValueError(f"{op}: row {wrong - 1} has adapter {int(adapter_T[wrong - 1])}, wanted below {adapters}")
