"""Weights from their quantized form: what a linear layer reads until a pass gives it a kernel for that form.

It is computed at load (a recipe), never in the step: a layer whose quantized form no kernel serves still runs, on the
dequantized weight. The forms are those of `quantize_weight`.
Source: https://github.com/vllm-project/compressed-tensors; DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 3.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .contract import contract
from .draw import Draw
from .quantize_weight import FORMATS, expand_blocks, quantize_weight, unpack_int4, weight_scale


@contract(opaque=True, flops=lambda stored, width: stored.shape[0] * width)
def dequantize_weight(
    stored: Tensor, scale: Tensor, zero: Tensor | None, format: str, rows: int, columns: int, width: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return (stored - zero) · scale: the weight (N, width) in `dtype`, multiplied in the scale's dtype.

    stored  (N, K) float8_e4m3fn or int8, or int32 (N, ⌈K/8⌉) for int4; width is K
    scale   one for each block of (rows, columns) weights, 0 meaning all; zero: int8 of the scale's shape, or None
    Raises ValueError for another format.
    """
    if format not in FORMATS:
        raise ValueError(f"dequantize_weight: format {format!r} is not one of {', '.join(FORMATS)}")
    plain = unpack_int4(stored, width) if format == "int4" else stored
    shape, wide = (stored.shape[0], width), scale.dtype
    values_NK = plain.to(wide)
    if zero is not None:
        values_NK = values_NK - expand_blocks(zero.to(wide), shape, rows, columns)
    return (values_NK * expand_blocks(scale, shape, rows, columns)).to(dtype)


@dequantize_weight.inputs(
    examples=(
        {"N": 5, "K": 33, "format": "int8", "rows": 1}, {"N": 130, "K": 200, "rows": 128, "columns": 128},
        {"N": 3, "K": 70, "format": "int4", "rows": 1, "columns": 32},
    ),
    shapes={"deepseek-v3 block": {"N": 4096, "K": 7168, "rows": 128, "columns": 128}},
    sizes={"N": (1, 150), "K": (1, 200), "format": list(FORMATS), "rows": [0, 1, 128], "columns": [0, 32, 128]},
)  # fmt: skip
def make(draw: Draw, N: int, K: int, format: str = "float8_e4m3fn", rows: int = 0, columns: int = 0) -> tuple[Any, ...]:
    weight_NK = draw.normal(N, K)
    scale = weight_scale(weight_NK, format, rows, columns)
    return quantize_weight(weight_NK, scale, format, rows, columns), scale, None, format, rows, columns, K, draw.dtype
