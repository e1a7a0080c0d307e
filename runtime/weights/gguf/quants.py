"""GGML's block formats, turned back into float32 by llama.cpp's own Python package, or into integers for kernels.

A block of 32 has a scale and perhaps a minimum in float16; a block of 256 ("K") has quantized scales for its parts.
As integers, a weight is int · scale, or int · scale + offset, in groups that share both.
Source: gguf.quants, https://github.com/ggml-org/llama.cpp/tree/master/gguf-py; sizes: ggml-common.h there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from seamwise.extras import pip_install

MXFP4_BLOCK = 32  # values that share an exponent


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """How values are stored: `block` of them in `num_bytes`; plain ones as they are in `dtype`."""

    name: str
    block: int
    num_bytes: int
    dtype: torch.dtype = torch.float32

    def values(self, raw: Tensor) -> Tensor:
        """Return the values, (any number of whole blocks,), of bytes, uint8.

        Raises RuntimeError for blocks where the gguf package is not installed.
        """
        if self.block == 1 or not len(raw):
            return raw.view(self.dtype)
        try:
            import gguf
        except ImportError as error:
            raise RuntimeError(f"{self.name} weights need the gguf package: {pip_install('gguf')}") from error
        with np.errstate(all="ignore"):  # scales may be infinite in a file of no sense
            blocks = raw.view(-1, self.num_bytes).numpy()
            return torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType[self.name])).view(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """How kernels read a kind: as integers in a format, with a scale and perhaps an offset for each group.

    unpack  blocks, uint8 (N, bytes) -> values in their order, uint8 of int4 plus 8 or int8 (N, block); scales float32
            (N, groups); offsets float32 (N, groups), where there are any
    """

    format: str
    group: int
    unpack: Callable[[Tensor], tuple[Tensor, ...]]
    has_offset: bool = False

    def parts(self, raw: Tensor) -> tuple[Tensor, ...]:
        """Return what a kernel reads of bytes of whole blocks, flat: int32 words of int4 or int8, scales, offsets."""
        values, *floats = self.unpack(raw)
        if self.format == "int4":
            values = (values[:, ::2] | values[:, 1::2] << 4).contiguous().view(torch.int32)
        return values.flatten(), *(f.flatten() for f in floats)


def mxfp4_parts(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Return what kernels read of MXFP4 blocks: bytes of two neighbours, the first below, and exponents; both uint8.

    A block holds its exponent, then bytes of a value and the one 16 columns behind it.
    """
    blocks = raw.view(-1, 1 + MXFP4_BLOCK // 2)
    values = _bits(blocks[:, None, 1:], (0, 4), 15)
    return values[:, ::2] | values[:, 1::2] << 4, blocks[:, 0].contiguous()


def _float16(blocks: Tensor, at: int) -> Tensor:
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _bits(stored: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """Return the bits of bytes (N, parts, bytes) from each shift on: (N, parts · shifts · bytes)."""
    return torch.stack([stored >> shift & mask for shift in shifts], 2).flatten(1)


def _q4_0(blocks: Tensor) -> tuple[Tensor, ...]:
    return _bits(blocks[:, None, 2:], (0, 4), 15), _float16(blocks, 0)


def _q4_1(blocks: Tensor) -> tuple[Tensor, ...]:
    scale = _float16(blocks, 0)
    return _bits(blocks[:, None, 4:], (0, 4), 15), scale, _float16(blocks, 2) + 8 * scale


def _q5_0(blocks: Tensor) -> tuple[Tensor, ...]:
    fifth = (blocks[:, 2:6, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)
    values = _bits(blocks[:, None, 6:], (0, 4), 15) | fifth << 4
    return values.to(torch.int8) - 16, _float16(blocks, 0)


def _q8_0(blocks: Tensor) -> tuple[Tensor, ...]:
    return blocks[:, 2:].contiguous().view(torch.int8), _float16(blocks, 0)


def _q4_k(blocks: Tensor) -> tuple[Tensor, ...]:
    low, middle, high = blocks[:, 4:16].view(-1, 3, 4).unbind(1)  # 8 scales and 8 minima of 6 bits
    scales = torch.cat((low & 63, high & 15 | low >> 2 & 48), 1)
    minima = torch.cat((middle & 63, high >> 4 | middle >> 2 & 48), 1)
    scale = _float16(blocks, 0) * scales
    return _bits(blocks[:, 16:].view(-1, 4, 32), (0, 4), 15), scale, 8 * scale - _float16(blocks, 2) * minima


def _q6_k(blocks: Tensor) -> tuple[Tensor, ...]:
    low, high = blocks[:, :128].view(-1, 2, 64), blocks[:, 128:192].view(-1, 2, 32)
    values = _bits(low, (0, 4), 15) | _bits(high, (0, 2, 4, 6), 3) << 4
    return values.to(torch.int8) - 32, _float16(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8)


PACKED = {
    "Q4_0": Packed(format="int4", group=32, unpack=_q4_0),
    "Q4_1": Packed(format="int4", group=32, unpack=_q4_1, has_offset=True),
    "Q4_K": Packed(format="int4", group=32, unpack=_q4_k, has_offset=True),
    "Q5_0": Packed(format="int8", group=32, unpack=_q5_0),
    "Q6_K": Packed(format="int8", group=16, unpack=_q6_k),
    "Q8_0": Packed(format="int8", group=32, unpack=_q8_0),
}
_BLOCKS = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "Q2_K": (256, 84),
    "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210), "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136), "MXFP4": (32, 17), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ3_XXS": (256, 98),
    "IQ1_S": (256, 50), "IQ3_S": (256, 110), "IQ2_S": (256, 82), "IQ1_M": (256, 56), "TQ1_0": (256, 54),
    "TQ2_0": (256, 66),
}  # fmt: skip
KINDS = {
    "F32": Kind(name="F32", block=1, num_bytes=4),
    "F16": Kind(name="F16", block=1, num_bytes=2, dtype=torch.float16),
    "BF16": Kind(name="BF16", block=1, num_bytes=2, dtype=torch.bfloat16),
    "F64": Kind(name="F64", block=1, num_bytes=8, dtype=torch.float64),
} | {name: Kind(name=name, block=block, num_bytes=size) for name, (block, size) in _BLOCKS.items()}
