"""Linear layers over int4 or int8 weights packed once for CPUs, with float scales and offsets for groups of inputs.

The layout is that of linear.py with fewer bits an element: panels of 32 columns, whose words of two inputs are
32 bytes of int4, columns 0 … 15 in their low halves, 16 … 31 in the high ones, or 64 bytes of int8. One row reads a
quarter or half of bfloat16's bytes, and both are exact in bfloat16: only sums round.
Source: kernels/linear/w4a16_linear.py for the weights; VPERMW as a table of 16 values, https://www.felixcloutier.com/x86/vpermw.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import contract
from seamwise.kernels.cpu import huge_pages
from seamwise.kernels.cpu.tape import Kernel, empty, launch
from seamwise.kernels.draw import Draw
from seamwise.kernels.quant.quantize_weight import unpack_int4
from seamwise.kernels.signature import cdiv

from .linear import PANEL

_LINEAR = Kernel("linear_cpu.cpp", "seamwise_linear_int")
_PACKED_AT_ONCE = 1 << 22  # values: experts' of a layer, a hundred times as many, would take 20 bytes each meanwhile


def _limits(stored: Tensor, in_features: int) -> str | None:
    columns = cdiv(in_features, 8) if stored.dtype == torch.int32 else in_features
    return None if stored.shape[1] == columns else f"stored has {stored.shape[1]} columns, wanted {columns}"


@contract(args={"stored": "N W int32|int8!"}, limits=_limits, opaque=True)
def pack_int_panels(stored: Tensor, in_features: int) -> Tensor:
    """Return integers as panels of 32 rows.

    int32 (N, ⌈K/8⌉), int4 as `w4a16_linear` has it: uint8 (⌈N/32⌉, ⌈K/2⌉, 32); int8 (N, K): int8 (⌈N/32⌉, ⌈K/2⌉, 64)
    """
    padded = _padded(stored, in_features)
    words = padded.unflatten(0, (-1, PANEL)).unflatten(2, (-1, 2)).transpose(1, 2).flatten(2)  # (P, W, column · input)
    return words[..., :PANEL] | words[..., PANEL:] << 4 if stored.dtype == torch.int32 else words


def _padded(stored: Tensor, in_features: int) -> Tensor:
    """Return integers (N, K), 0 … 15 of int4, with whole panels and words."""
    int4 = stored.dtype == torch.int32
    values_NK = (unpack_int4(stored, in_features) + 8).to(torch.uint8) if int4 else stored
    N, K = values_NK.shape
    return torch.nn.functional.pad(values_NK, (0, -K % 2, 0, -N % PANEL), value=8 if int4 else 0)


@pack_int_panels.provider("huge_pages", devices=("cpu",), strided=True)
def pack_into_huge_pages(stored: Tensor, in_features: int) -> Tensor:
    """The same, where the kernel reads fastest, some panels at a time; a word of two inputs moves as one int16."""
    int4 = stored.dtype == torch.int32
    form = (cdiv(stored.shape[0], PANEL), cdiv(in_features, 2), PANEL)
    out = huge_pages.empty(form, torch.uint8 if int4 else torch.int16)
    step = max(_PACKED_AT_ONCE // max(PANEL * in_features, 1), 1)
    for first in range(0, form[0], step):
        padded = _padded(stored[first * PANEL : (first + step) * PANEL], in_features)
        words = padded.contiguous().view(torch.int16).unflatten(0, (-1, PANEL)).transpose(1, 2)
        if int4:
            pairs = words.contiguous().view(torch.uint8)
            torch.bitwise_or(pairs[..., :PANEL], pairs[..., PANEL:] << 4, out=out[first : first + step])
        else:
            out[first : first + step].copy_(words)
    return out if int4 else out.view(torch.int8)


@contract(opaque=True)
def pack_group_values(values_NG: Tensor) -> Tensor:
    """Return a value of each row's groups as panels: float32 (⌈N/32⌉, G, 32), zero where is no row."""
    padded = torch.nn.functional.pad(
        values_NG.to(torch.promote_types(values_NG.dtype, torch.float32)), (0, 0, 0, -values_NG.shape[0] % PANEL)
    )
    return padded.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


_VALUES = "[cdiv(out_features,32) blocks(K,group) 32] float32"


def limits_panels(panels: Tensor) -> str | None:
    """Return why panels are none of their dtype, or None."""
    columns = PANEL if panels.dtype == torch.uint8 else 2 * PANEL
    return None if panels.shape[2] == columns else f"panels of {panels.dtype} have {panels.shape[2]}, wanted {columns}"


@contract(
    args={
        "panels": "[cdiv(out_features,32) cdiv(K,2) 32|64] uint8|int8!", "scale_PGC": _VALUES, "offset_PGC": _VALUES,
        "bias_N": "out_features",
    },
    limits=limits_panels, opaque=True, flops=lambda x_TK, out_features: 2 * x_TK.numel() * out_features,
    fake=lambda x_TK, out_features: x_TK.new_empty((x_TK.shape[0], out_features)),
)  # fmt: skip
def linear_int(
    x_TK: Tensor, panels: Tensor, scale_PGC: Tensor, offset_PGC: Tensor | None, group: int, out_features: int,
    bias_N: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return x wᵀ + bias: (T, N) in x's dtype, for w = int · scale + offset; sums in float32 or wider.

    panels  of `pack_int_panels`; scale and offset float32 of `pack_group_values`; group 0: one a row
    Moves T·K + T·N elements, N·K/2 bytes of int4 or N·K of int8, and the scales, and takes 2·T·N·K flops.
    """
    K, wide = x_TK.shape[1], scale_PGC.dtype
    int4 = panels.dtype == torch.uint8
    words = torch.cat((panels & 15, panels >> 4), 2) if int4 else panels
    values_NK = words.unflatten(2, (PANEL, 2)).transpose(1, 2).flatten(2).flatten(0, 1)[:, :K].to(wide) - 8 * int4

    def of_columns(values_PGC: Tensor) -> Tensor:
        return values_PGC.transpose(1, 2).flatten(0, 1).repeat_interleave(group or K, 1)[:, :K]

    weight_NK = values_NK * of_columns(scale_PGC)
    if offset_PGC is not None:
        weight_NK = weight_NK + of_columns(offset_PGC)
    out_TN = x_TK.to(wide) @ weight_NK[:out_features].T
    return (out_TN if bias_N is None else out_TN + bias_N.to(wide)).to(x_TK.dtype)


def _stored(draw: Draw, N: int, K: int, int8: bool) -> Tensor:
    if int8:
        return draw.integers(-128, 128, N, K, dtype=torch.int8)
    return draw.integers(-(2**31), 2**31, N, -(-K // 8), dtype=torch.int32)


@pack_int_panels.inputs(
    examples=({"N": 33, "K": 7}, {"N": 64, "K": 64}, {"N": 1, "K": 1}, {"N": 33, "K": 7, "int8": True}),
    shapes={"smollm2-135m": {"N": 3072, "K": 576}, "smollm2-135m head": {"N": 49152, "K": 576, "int8": True}},
    sizes={"N": (1, 80), "K": (1, 80), "int8": [False, True]},
)
def make_weight(draw: Draw, N: int, K: int, int8: bool = False) -> tuple[Tensor, int]:
    return _stored(draw, N, K, int8), K


@pack_group_values.inputs(
    examples=({"N": 33, "G": 7}, {"N": 1, "G": 1}),
    shapes={"smollm2-135m": {"N": 3072, "G": 18}},
    sizes={"N": (1, 80), "G": (1, 20)},
)
def make_values(draw: Draw, N: int, G: int) -> tuple[Tensor]:
    return (draw(N, G),)


@linear_int.inputs(
    examples=(
        {"T": 1, "N": 33, "K": 7}, {"T": 13, "N": 64, "K": 96, "group": 32, "offset": True}, {"T": 0, "N": 32, "K": 16},
        {"T": 9, "N": 20, "K": 80, "group": 32, "bias": True}, {"T": 1, "N": 33, "K": 7, "int8": True},
        {"T": 20, "N": 64, "K": 97, "group": 16, "offset": True, "int8": True},
    ),
    shapes={
        "smollm2-135m decode": {"T": 1, "N": 3072, "K": 576, "group": 32},
        "smollm2-135m batch": {"T": 32, "N": 3072, "K": 576, "group": 32},
        "smollm2-135m head": {"T": 1, "N": 49152, "K": 576, "group": 32, "int8": True},
        "llama-3-8b decode": {"T": 1, "N": 28672, "K": 4096, "group": 128},
    },
    sizes={
        "T": (0, 20), "N": (1, 80), "K": [1, 8, 33, 64, 200], "group": [0, 2, 32, 128], "offset": [False, True],
        "bias": [False, True], "int8": [False, True],
    },
    rows=(0,),
)  # fmt: skip
def make(
    draw: Draw, T: int, N: int, K: int, group: int = 0, offset: bool = False, bias: bool = False, int8: bool = False
) -> tuple[Any, ...]:
    scale_PGC, offset_PGC = (pack_group_values.meaning(draw.normal(N, -(-K // group) if group else 1)) for _ in "so")
    panels = pack_int_panels.meaning(_stored(draw, N, K, int8), K)
    return draw(T, K), panels, scale_PGC, offset_PGC if offset else None, group, N, draw(N) if bias else None


def refuses_int(x_TK: Tensor, group: int, bias_N: Tensor | None) -> str | None:
    """Return why the kernels in C++ do not take this input, or None."""
    if x_TK.dtype != torch.bfloat16 or not x_TK.shape[1]:
        return f"x must be bfloat16 of some columns, got {x_TK.dtype} {tuple(x_TK.shape)}"
    if group % 2:
        return f"group must be even, for words of two inputs, got {group}"
    return (
        f"bias must be {x_TK.dtype}, got {bias_N.dtype}" if bias_N is not None and bias_N.dtype != x_TK.dtype else None
    )


@linear_int.provider("cpp", devices=("cpu",), refuses=refuses_int, launches=True)
def linear_int_cpp(
    x_TK: Tensor, panels: Tensor, scale_PGC: Tensor, offset_PGC: Tensor | None, group: int, out_features: int,
    bias_N: Tensor | None = None,
) -> Tensor:  # fmt: skip
    T, K = x_TK.shape
    out_TN = empty((T, out_features), x_TK.dtype)
    sums_TG = empty((T, scale_PGC.shape[1]), torch.float32) if offset_PGC is not None else None
    launch(
        _LINEAR, 8 if panels.dtype == torch.int8 else 4, x_TK.data_ptr(), panels.data_ptr(),
        scale_PGC.data_ptr(), *(0 if a is None else a.data_ptr() for a in (offset_PGC, sums_TG, bias_N)),
        out_TN.data_ptr(), T, out_features, K, group or K + K % 2, 2 * x_TK.stride(0), 2 * out_features,
        torch.get_num_threads(),
    )  # fmt: skip
    return out_TN
