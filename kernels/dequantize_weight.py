"""Weights from their quantized form: what a linear layer reads until a pass gives it a kernel for that form.

It is computed at load (a recipe), never in the step: a layer whose quantized form no kernel serves still runs, on the
dequantized weight. The forms are those of `quantize_weight`.
Source: https://github.com/vllm-project/compressed-tensors; DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 3.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .contract import Cost, contract
from .quantize_weight import FORMATS, expand_blocks, quantize_weight, unpack_int4, weight_scale


@contract(opaque=True)
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
    if format not in FORMATS:
        raise ValueError(f"dequantize_weight: format {format!r} is not one of {', '.join(FORMATS)}")
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


@dequantize_weight.costs
def cost(
    stored: Tensor, scale: Tensor, zero: Tensor | None, format: str, rows: int, columns: int, width: int,
    dtype: torch.dtype,
) -> Cost:  # fmt: skip
    written = stored.shape[0] * width
    read = sum(a.nbytes for a in (stored, scale, zero) if a is not None)
    return Cost(bytes=read + written * dtype.itemsize, flops=written)


@dequantize_weight.inputs(
    examples=(
        {"N": 5, "K": 33, "format": "int8", "rows": 1}, {"N": 130, "K": 200, "rows": 128, "columns": 128},
        {"N": 3, "K": 70, "format": "int4", "rows": 1, "columns": 32},
        {"N": 3, "K": 70, "format": "int4", "rows": 1, "columns": 32, "offset": True},
    ),
    shapes={"deepseek-v3 block": {"N": 4096, "K": 7168, "rows": 128, "columns": 128}},
    sizes={
        "N": (1, 150), "K": (1, 200), "format": list(FORMATS), "rows": [0, 1, 128], "columns": [0, 32, 128],
        "offset": [False, True],
    },
)  # fmt: skip
def make(
    N: int, K: int, format: str = "float8_e4m3fn", rows: int = 0, columns: int = 0, offset: bool = False, *,
    dtype: torch.dtype, device: str, seed: int,
) -> tuple[Any, ...]:  # fmt: skip
    generator = torch.Generator(device).manual_seed(seed)
    weight_NK = torch.randn(N, K, generator=generator, device=device)
    scale = weight_scale(weight_NK, format, rows, columns)
    zero = torch.randn(scale.shape, generator=generator, device=device) if offset else None
    return quantize_weight(weight_NK, scale, format, rows, columns), scale, zero, format, rows, columns, K, dtype
