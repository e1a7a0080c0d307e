"""Quantization of weights, at load: the scales first, then the values; both are recipes of derived tensors.

Formats: "float8_e4m3fn" and "int8" are stored as torch's dtypes; "int4" as the layout "pack-quantized" of
compressed-tensors, https://github.com/vllm-project/compressed-tensors: 8 values in an int32, the first in the lowest
4 bits, each plus 8.
Source: blocks of 128 × 128: DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 3.3.2; int8 channels: Dettmers et
al. 2022, https://arxiv.org/abs/2208.07339; int4 groups: Frantar et al. 2022, https://arxiv.org/abs/2210.17323.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import contract
from seamwise.kernels.draw import Draw

# The magnitude of a scale's largest weight, and the range of values: int4 spends both ends, so that ± max is ± 7.5.
FORMATS = {"float8_e4m3fn": (448.0, -448.0, 448.0), "int8": (127.0, -127.0, 127.0), "int4": (7.5, -8.0, 7.0)}
_LEAST = 1e-10  # the least magnitude a scale stands for: blocks of zeros have a scale too


def expand_blocks(scale: Tensor, shape: tuple[int, ...], rows: int, columns: int) -> Tensor:
    """Return block scales (⌈N/rows⌉, ⌈K/columns⌉) as one a weight, (N, K); rows or columns 0: all of them."""
    rows, columns = rows or max(shape[0], 1), columns or max(shape[1], 1)
    return scale.repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(columns, 1)[:, : shape[1]]


def _limits(format: str) -> str | None:
    return None if format in FORMATS else f"format {format!r} is not one of {', '.join(FORMATS)}"


@contract(opaque=True, limits=_limits, flops=lambda weight_NK: weight_NK.numel())
def weight_scale(weight_NK: Tensor, format: str, rows: int, columns: int) -> Tensor:
    """Return the scales (⌈N/rows⌉, ⌈K/columns⌉) float32 of blocks of (rows, columns) weights; 0: all of them.

    (128, 128) are DeepSeek-V3's blocks, (1, 0) channels, (0, 0) the whole tensor, (1, 128) groups. A scale is
    max |w| / 448 for float8_e4m3fn, / 127 for int8, / 7.5 for int4. Raises ValueError for any other format.
    """
    largest, _, _ = FORMATS[format]
    N, K = weight_NK.shape
    rows, columns = rows or max(N, 1), columns or max(K, 1)
    down, across = -(-N // rows), -(-K // columns)
    padded = torch.nn.functional.pad(_wide(weight_NK), (0, across * columns - K, 0, down * rows - N))
    blocks = padded.view(down, rows, across, columns)
    return (blocks.abs().amax((1, 3)).clamp(min=_LEAST) / largest).float()


@contract(
    args={"scale": "blocks(N,rows) blocks(K,columns) float32"}, limits=_limits, opaque=True,
    flops=lambda weight_NK: 2 * weight_NK.numel(),
)  # fmt: skip
def quantize_weight(weight_NK: Tensor, scale: Tensor, format: str, rows: int, columns: int) -> Tensor:
    """Return weight / scale, rounded to nearest even and saturated: (N, K), or int32 (N, ⌈K/8⌉) for int4.

    `scale`, `format`, `rows` and `columns` are those of `weight_scale`.
    """
    _, low, high = FORMATS[format]
    wide_NK = _wide(weight_NK)
    ratio = (wide_NK / expand_blocks(scale, tuple(weight_NK.shape), rows, columns)).clamp(low, high)
    if format == "float8_e4m3fn":
        return ratio.to(torch.float8_e4m3fn)
    values = ratio.round().to(torch.int8)
    return pack_int4(values) if format == "int4" else values


def _wide(weight_NK: Tensor) -> Tensor:
    return weight_NK.to(torch.promote_types(weight_NK.dtype, torch.float32))


def pack_int4(values_NK: Tensor) -> Tensor:
    """Pack int8 values -8 … 7 (N, K) into int32 (N, ⌈K/8⌉), the first in the lowest bits; what is over is zero."""
    width = values_NK.shape[1]
    nibbles = torch.nn.functional.pad(values_NK.to(torch.int32) + 8, (0, -width % 8)).unflatten(1, (-1, 8))
    return (nibbles << torch.arange(0, 32, 4, dtype=torch.int32, device=values_NK.device)).sum(-1, dtype=torch.int32)


def unpack_int4(packed: Tensor, width: int) -> Tensor:
    """Return the int8 values -8 … 7 (N, width) that int32 (N, ⌈width/8⌉) holds.

    Zero points are packed along N: theirs are unpack_int4(packed.T, N).T.
    """
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts & 15) - 8).flatten(-2)[..., :width].to(torch.int8)


@weight_scale.inputs(
    examples=(
        {"N": 5, "K": 33, "format": "int8", "rows": 1}, {"N": 130, "K": 200, "rows": 128, "columns": 128},
        {"N": 3, "K": 70, "format": "int4", "rows": 1, "columns": 32}, {"N": 4, "K": 9},
    ),
    shapes={"deepseek-v3 block": {"N": 4096, "K": 7168, "rows": 128, "columns": 128}},
    sizes={"N": (1, 150), "K": (1, 200), "format": list(FORMATS), "rows": [0, 1, 128], "columns": [0, 32, 128]},
)  # fmt: skip
def make_scale(
    draw: Draw, N: int, K: int, format: str = "float8_e4m3fn", rows: int = 0, columns: int = 0
) -> tuple[Any, ...]:
    return (draw.normal(N, K) * K**-0.5).to(draw.dtype), format, rows, columns


@quantize_weight.inputs(examples=weight_scale.examples, shapes=weight_scale.shapes, sizes=weight_scale.sizes)
def make(draw: Draw, **sizes: Any) -> tuple[Any, ...]:
    weight_NK, *form = weight_scale.drawn(draw, **sizes)
    return weight_NK, weight_scale(weight_NK, *form), *form
