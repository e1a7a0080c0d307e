"""Linear layers over int4, int8 or float8 weights packed once for CPUs, with scales and offsets for groups of inputs.

The layout is that of linear.py with fewer bits an element: panels of 32 columns, whose words of two inputs are
32 bytes of int4, columns 0 … 15 in their low halves, 16 … 31 in the high ones, or 64 bytes of int8 or float8. One row
reads a quarter or half of bfloat16's bytes, and all are exact in bfloat16: only sums round. Rows beside float8 weights
are float8 too, as their checkpoints mean it (`scaled_linear`), and are widened as the weights are.
Source: kernels/linear/w4a16_linear.py for the weights; VPERMW as a table of 16 values, https://www.felixcloutier.com/x86/vpermw.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import contract
from seamwise.kernels.cpu import huge_pages
from seamwise.kernels.cpu.dtypes import DTYPES
from seamwise.kernels.cpu.linear_cpu import launch_linear
from seamwise.kernels.cpu.tape import empty
from seamwise.kernels.draw import Draw
from seamwise.kernels.quant.quantize import quantize_rows
from seamwise.kernels.quant.quantize_weight import unpack_int4
from seamwise.kernels.signature import cdiv

from .linear import PANEL

FORMATS = ("int4", "int8", "float8_e4m3fn")
PANELS = "uint8|int8|float8_e4m3fn!"
_PACKED_AT_ONCE = 1 << 22  # values: experts' of a layer, a hundred times as many, would take 20 bytes each meanwhile


def _limits(stored: Tensor, in_features: int) -> str | None:
    columns = cdiv(in_features, 8) if stored.dtype == torch.int32 else in_features
    return None if stored.shape[1] == columns else f"stored has {stored.shape[1]} columns, wanted {columns}"


@contract(args={"stored": "N W int32|int8|float8_e4m3fn!"}, limits=_limits, opaque=True)
def pack_int_panels(stored: Tensor, in_features: int) -> Tensor:
    """Return values as panels of 32 rows.

    stored  int32 (N, ⌈K/8⌉), int4 as `w4a16_linear` has it, as uint8 (⌈N/32⌉, ⌈K/2⌉, 32); int8 or float8_e4m3fn (N, K)
            as (⌈N/32⌉, ⌈K/2⌉, 64) of them
    """
    int4 = stored.dtype == torch.int32
    values_NK = (unpack_int4(stored, in_features) + 8).to(torch.uint8) if int4 else stored.view(torch.int8)
    N, K = values_NK.shape
    padded = torch.nn.functional.pad(values_NK, (0, -K % 2, 0, -N % PANEL), value=8 if int4 else 0)
    pairs = padded.contiguous().view(torch.int16)  # a word of two inputs moves as one
    words = pairs.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous().view(torch.uint8 if int4 else stored.dtype)
    return words[..., :PANEL] | words[..., PANEL:] << 4 if int4 else words


@pack_int_panels.provider("huge_pages", devices=("cpu",), strided=True)
def pack_into_huge_pages(stored: Tensor, in_features: int) -> Tensor:
    """The same, where the kernel reads fastest, some panels at a time."""
    one = pack_int_panels.meaning(stored[:1], in_features)
    out = huge_pages.empty((cdiv(stored.shape[0], PANEL), *one.shape[1:]), one.dtype)
    step = max(_PACKED_AT_ONCE // max(PANEL * in_features, 1), 1)
    for first in range(0, len(out), step):
        out[first : first + step] = pack_int_panels.meaning(stored[first * PANEL : (first + step) * PANEL], in_features)
    return out


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
        "panels": f"[cdiv(out_features,32) cdiv(K,2) 32|64] {PANELS}", "offset_PGC": _VALUES,
        "scale_PGC": _VALUES.replace(" 32]", " 32|1]"),
        "bias_N": "out_features", "x_scale_TG": "[T blocks(K,group)] float32",
    },
    limits=limits_panels, opaque=True, flops=lambda x_TK, out_features: 2 * x_TK.numel() * out_features,
    fake=lambda x_TK, out_features, dtype: x_TK.new_empty((x_TK.shape[0], out_features), dtype=dtype or x_TK.dtype),
)  # fmt: skip
def linear_int(
    x_TK: Tensor, panels: Tensor, scale_PGC: Tensor, offset_PGC: Tensor | None, group: int, out_features: int,
    bias_N: Tensor | None = None, x_scale_TG: Tensor | None = None, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Return x wᵀ + bias: (T, N) in `dtype` (None: x's), for w = value · scale + offset; sums in float32 or wider.

    panels   of `pack_int_panels`; scale and offset of `pack_group_values`, or a scale a panel; group 0: one a row
    x_scale  float32 (T, ⌈K/group⌉) that x, quantized, is multiplied by; or None
    Moves T·K + T·N elements, N·K/2 bytes of int4 or N·K of int8 and float8, and the scales, and takes 2·T·N·K flops.
    """
    K, wide = x_TK.shape[1], scale_PGC.dtype
    int4 = panels.dtype == torch.uint8
    words = torch.cat((panels & 15, panels >> 4), 2) if int4 else panels
    values_NK = words.unflatten(2, (PANEL, 2)).transpose(1, 2).flatten(2).flatten(0, 1)[:, :K].to(wide) - 8 * int4
    x_wide = x_TK.to(wide)
    if x_scale_TG is not None:
        x_wide = x_wide * x_scale_TG.repeat_interleave(group or K, 1)[:, :K]

    def of_columns(values_PGC: Tensor) -> Tensor:
        return values_PGC.expand(-1, -1, PANEL).transpose(1, 2).flatten(0, 1).repeat_interleave(group or K, 1)[:, :K]

    weight_NK = values_NK * of_columns(scale_PGC)
    if offset_PGC is not None:
        weight_NK = weight_NK + of_columns(offset_PGC)
    out_TN = x_wide @ weight_NK[:out_features].T
    return (out_TN if bias_N is None else out_TN + bias_N.to(wide)).to(dtype or x_TK.dtype)


def _stored(draw: Draw, N: int, K: int, format: str) -> Tensor:
    if format == "int4":
        return draw.integers(-(2**31), 2**31, N, -(-K // 8), dtype=torch.int32)
    values = draw.integers(-128, 128, N, K, dtype=torch.int8)
    return values if format == "int8" else values.to(torch.float8_e4m3fn)


@pack_int_panels.inputs(
    examples=(
        {"N": 33, "K": 7}, {"N": 64, "K": 64}, {"N": 1, "K": 1}, {"N": 33, "K": 7, "format": "int8"},
        {"N": 33, "K": 7, "format": "float8_e4m3fn"},
    ),
    shapes={"smollm2-135m": {"N": 3072, "K": 576}, "smollm2-135m head": {"N": 49152, "K": 576, "format": "int8"}},
    sizes={"N": (1, 80), "K": (1, 80), "format": list(FORMATS)},
)  # fmt: skip
def make_weight(draw: Draw, N: int, K: int, format: str = "int4") -> tuple[Tensor, int]:
    return _stored(draw, N, K, format), K


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
        {"T": 9, "N": 20, "K": 80, "group": 32, "bias": True}, {"T": 1, "N": 33, "K": 7, "format": "int8"},
        {"T": 20, "N": 64, "K": 97, "group": 16, "offset": True, "format": "int8"},
        {"T": 1, "N": 33, "K": 7, "format": "float8_e4m3fn"},
        {"T": 20, "N": 64, "K": 297, "group": 128, "bias": True, "format": "float8_e4m3fn"},
    ),
    shapes={
        "smollm2-135m decode": {"T": 1, "N": 3072, "K": 576, "group": 32},
        "smollm2-135m batch": {"T": 32, "N": 3072, "K": 576, "group": 32},
        "smollm2-135m head": {"T": 1, "N": 49152, "K": 576, "group": 32, "format": "int8"},
        "llama-3-8b decode": {"T": 1, "N": 28672, "K": 4096, "group": 128},
        "qwen3-0.6b fp8 decode": {"T": 1, "N": 6144, "K": 1024, "group": 128, "format": "float8_e4m3fn"},
        "qwen3-0.6b fp8 prefill": {"T": 512, "N": 6144, "K": 1024, "group": 128, "format": "float8_e4m3fn"},
    },
    sizes={
        "T": (0, 20), "N": (1, 80), "K": [1, 8, 33, 64, 200], "group": [0, 2, 32, 128], "offset": [False, True],
        "bias": [False, True], "format": list(FORMATS),
    },
    rows=(0, 7),
)  # fmt: skip
def make(
    draw: Draw, T: int, N: int, K: int, group: int = 0, offset: bool = False, bias: bool = False, format: str = "int4"
) -> tuple[Any, ...]:
    """Beside float8 weights rows are float8, and there is no offset."""
    scale_PGC, offset_PGC = (pack_group_values.meaning(draw.normal(N, -(-K // group) if group else 1)) for _ in "so")
    panels, bias_N = pack_int_panels.meaning(_stored(draw, N, K, format), K), draw(N) if bias else None
    if format == "float8_e4m3fn":
        x_TK, x_scale_TG = quantize_rows(draw.normal(T, K), torch.float8_e4m3fn, group)
        return x_TK, panels, scale_PGC, None, group, N, bias_N, x_scale_TG, draw.dtype
    return draw(T, K), panels, scale_PGC, offset_PGC if offset else None, group, N, bias_N, None, None


def refuses_int(
    x: Tensor, panels: Tensor, offset: Tensor | None, group: int, bias: Tensor | None, x_scale: Tensor | None,
    dtype: torch.dtype | None,
) -> str | None:  # fmt: skip
    """Return why the kernels in C++ do not take this input, or None."""
    float8, out = panels.dtype == torch.float8_e4m3fn, dtype or x.dtype
    wanted = torch.float8_e4m3fn if float8 else torch.bfloat16
    if x.dtype != wanted or not x.shape[1]:
        return f"x must be {str(wanted).removeprefix('torch.')} of some columns, got {x.dtype} {tuple(x.shape)}"
    if float8 != (x_scale is not None) or (float8 and offset is not None):
        return f"float8 weights, and no others, have scales of x, and no offset, got {panels.dtype}"
    if group % 2:
        return f"group must be even, for words of two inputs, got {group}"
    if out not in DTYPES:
        return f"the result must be float32 or bfloat16, got {out}"
    return f"bias must be {out}, got {bias.dtype}" if bias is not None and bias.dtype != out else None


@linear_int.provider(
    "cpp", devices=("cpu",), launches=True,
    refuses=lambda x_TK, panels, offset_PGC, group, bias_N, x_scale_TG, dtype: refuses_int(
        x_TK, panels, offset_PGC, group, bias_N, x_scale_TG, dtype
    ),
)  # fmt: skip
def linear_int_cpp(
    x_TK: Tensor, panels: Tensor, scale_PGC: Tensor, offset_PGC: Tensor | None, group: int, out_features: int,
    bias_N: Tensor | None = None, x_scale_TG: Tensor | None = None, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    out_TN = empty((x_TK.shape[0], out_features), dtype or x_TK.dtype)
    return launch_linear(x_TK, panels, out_TN, bias_N, group, (scale_PGC, offset_PGC, x_scale_TG))
