"""Weights from their quantized form: what a linear layer reads until a pass gives it a kernel for that form.

It is computed at load (a recipe), never in the step: a layer whose quantized form no kernel serves still runs, on the
dequantized weight. The forms are those of `quantize_weight`.
Source: https://github.com/vllm-project/compressed-tensors; DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 3.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.signature import cdiv

from .quantize_weight import FORMATS, expand_blocks, quantize_weight, unpack_int4, weight_scale


def _limits(stored: Tensor, format: str, width: int) -> str | None:
    if format not in FORMATS:
        return f"format {format!r} is not one of {', '.join(FORMATS)}"
    wanted = cdiv(width, 8) if format == "int4" else width
    return f"stored has {stored.shape[1]} columns, wanted {wanted}" if stored.shape[1] != wanted else None


_SCALE = "blocks(N,rows) blocks(width,columns)"


@contract(
    args={"stored": "N W", "scale": _SCALE, "zero": _SCALE}, limits=_limits, opaque=True,
    flops=lambda stored, width: stored.shape[0] * width,
)  # fmt: skip
def dequantize_weight(
    stored: Tensor, scale: Tensor, zero: Tensor | None, format: str, rows: int, columns: int, width: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return (stored - zero) · scale, or stored · scale + zero: the weight (N, width) in `dtype`.

    stored  (N, K) float8_e4m3fn or int8, or int32 (N, ⌈K/8⌉) for int4; width is K
    scale   one for each block of (rows, columns) weights, 0 meaning all; it is computed with in the scale's dtype
    zero    of the scale's shape: int8, taken from what is stored; floating, added to the weight; or None
    Raises ValueError for another format.
    """
    plain = unpack_int4(stored, width) if format == "int4" else stored

    def every(blocks: Tensor) -> Tensor:
        return expand_blocks(blocks.to(scale.dtype), (stored.shape[0], width), rows, columns)

    values_NK = plain.to(scale.dtype)
    if zero is not None and not zero.is_floating_point():
        values_NK = values_NK - every(zero)
    weight_NK = values_NK * every(scale)
    if zero is not None and zero.is_floating_point():
        weight_NK = weight_NK + every(zero)
    return weight_NK.to(dtype)


@dequantize_weight.inputs(
    examples=(*weight_scale.examples, {"N": 3, "K": 70, "format": "int4", "rows": 1, "columns": 32, "offset": True}),
    shapes=weight_scale.shapes,
    sizes={**weight_scale.sizes, "offset": [False, True]},
)
def make(draw: Draw, offset: bool = False, **sizes: Any) -> tuple[Any, ...]:
    weight_NK, *form = weight_scale.drawn(draw, **sizes)
    scale = weight_scale(weight_NK, *form)
    zero = draw.normal(*scale.shape) if offset else None
    return quantize_weight(weight_NK, scale, *form), scale, zero, *form, sizes["K"], draw.dtype
