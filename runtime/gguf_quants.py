"""GGML's block formats, turned back into float32: bit for bit what llama.cpp's own Python package computes.

Each function takes blocks, uint8 (N, bytes of a block), and returns values, float32 (N, values of a block). A block of
32 has a scale and perhaps a minimum in float16; a block of 256 ("K") has quantized scales for parts of 16 or 32.
Source: ggml-common.h and ggml-quants.c, https://github.com/ggml-org/llama.cpp/tree/master/ggml/src.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_Bytes = NDArray[np.uint8]
_Values = NDArray[np.float32]
_CHUNK = 1 << 17  # values: 400 M a second against 190 M at 1 << 20 (Zen 4), whose temporaries leave the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """How values are stored: `block` of them in `num_bytes`; as they are in `dtype`, or by `dequantize`."""

    block: int
    num_bytes: int
    dtype: torch.dtype = torch.float32
    dequantize: Callable[[_Bytes], _Values] | None = None

    def values(self, raw: Tensor) -> Tensor:
        """Return the values, (any number of whole blocks,), of bytes, uint8."""
        if self.dequantize is None:
            return raw.view(self.dtype)
        blocks = raw.view(-1, self.num_bytes).numpy()
        result = np.empty((len(blocks), self.block), np.float32)
        step = _CHUNK // self.block
        with np.errstate(all="ignore"):  # scales may be infinite in a file of no sense
            for start in range(0, len(blocks), step):
                result[start : start + step] = self.dequantize(blocks[start : start + step]).reshape(-1, self.block)
        return torch.from_numpy(result).view(-1)


def _f16(blocks: _Bytes, at: int) -> _Values:
    return blocks[:, at : at + 2].view(np.float16).astype(np.float32)


def _planes(packed: _Bytes, width: int, groups: int = 1) -> _Bytes:
    """Return (N, 8 / width fields of `groups` parts of each byte), the lowest bits of a whole group first."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    split = packed.reshape(len(packed), groups, 1, -1) >> shifts
    return (split & np.uint8((1 << width) - 1)).reshape(len(packed), -1)


def _signed(q: _Bytes, zero: int) -> _Values:
    return (q.astype(np.int8) - np.int8(zero)).astype(np.float32)


def _fifth_bit(bits: _Bytes) -> _Bytes:
    return np.unpackbits(bits, axis=1, bitorder="little") << np.uint8(4)


def _q4_0(b: _Bytes) -> _Values:
    return _f16(b, 0) * _signed(_planes(b[:, 2:], 4), 8)


def _q4_1(b: _Bytes) -> _Values:
    return _f16(b, 0) * _planes(b[:, 4:], 4).astype(np.float32) + _f16(b, 2)


def _q5_0(b: _Bytes) -> _Values:
    return _f16(b, 0) * _signed(_planes(b[:, 6:], 4) | _fifth_bit(b[:, 2:6]), 16)


def _q5_1(b: _Bytes) -> _Values:
    return _f16(b, 0) * (_planes(b[:, 8:], 4) | _fifth_bit(b[:, 4:8])).astype(np.float32) + _f16(b, 2)


def _q8_0(b: _Bytes) -> _Values:
    return _f16(b, 0) * b[:, 2:].view(np.int8).astype(np.float32)


def _parts(scale: _Values, q: _Bytes | _Values, minimum: _Values | None = None) -> _Values:
    """Multiply the parts of each block by their scales (N, parts) and subtract their minima."""
    scaled = scale[..., None] * q.reshape(*scale.shape, -1).astype(np.float32)
    return scaled if minimum is None else scaled - minimum[..., None]


def _q2_k(b: _Bytes) -> _Values:
    scale, minimum = b[:, :16] & np.uint8(15), b[:, :16] >> np.uint8(4)
    return _parts(_f16(b, 80) * scale, _planes(b[:, 16:80], 2, groups=2), _f16(b, 82) * minimum)


def _q3_k(b: _Bytes) -> _Values:
    high = _planes(b[:, :32], 1) ^ np.uint8(1)  # a set bit adds nothing, a clear one takes 4 away
    q = _planes(b[:, 32:96], 2, groups=2).astype(np.int8) - (high << np.uint8(2)).astype(np.int8)
    scale = _planes(b[:, 96:104], 4) | _planes(b[:, 104:108], 2) << np.uint8(4)
    return _parts(_f16(b, 108) * _signed(scale, 32), q.astype(np.float32))


def _scales_and_minima(b: _Bytes) -> tuple[_Values, _Values]:
    """Return (N, 8) scales and minima of Q4_K and Q5_K: six bits each, in twelve bytes."""
    low, mid, high = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    six, four, two = np.uint8(63), np.uint8(15), np.uint8(48)
    scale = np.concatenate((low & six, high & four | low >> np.uint8(2) & two), axis=1)
    minimum = np.concatenate((mid & six, high >> np.uint8(4) | mid >> np.uint8(2) & two), axis=1)
    return _f16(b, 0) * scale, _f16(b, 2) * minimum


def _q4_k(b: _Bytes) -> _Values:
    scale, minimum = _scales_and_minima(b)
    return _parts(scale, _planes(b[:, 16:], 4, groups=4), minimum)


def _q5_k(b: _Bytes) -> _Values:
    scale, minimum = _scales_and_minima(b)
    return _parts(scale, _planes(b[:, 48:], 4, groups=4) | _planes(b[:, 16:48], 1) << np.uint8(4), minimum)


def _q6_k(b: _Bytes) -> _Values:
    q = _planes(b[:, :128], 4, groups=2) | _planes(b[:, 128:192], 2, groups=2) << np.uint8(4)
    return _parts(_f16(b, 208) * b[:, 192:208].view(np.int8), _signed(q, 32))


KINDS = {
    "F32": Kind(block=1, num_bytes=4),
    "F16": Kind(block=1, num_bytes=2, dtype=torch.float16),
    "BF16": Kind(block=1, num_bytes=2, dtype=torch.bfloat16),
    "F64": Kind(block=1, num_bytes=8, dtype=torch.float64),
    "Q4_0": Kind(block=32, num_bytes=18, dequantize=_q4_0),
    "Q4_1": Kind(block=32, num_bytes=20, dequantize=_q4_1),
    "Q5_0": Kind(block=32, num_bytes=22, dequantize=_q5_0),
    "Q5_1": Kind(block=32, num_bytes=24, dequantize=_q5_1),
    "Q8_0": Kind(block=32, num_bytes=34, dequantize=_q8_0),
    "Q2_K": Kind(block=256, num_bytes=84, dequantize=_q2_k),
    "Q3_K": Kind(block=256, num_bytes=110, dequantize=_q3_k),
    "Q4_K": Kind(block=256, num_bytes=144, dequantize=_q4_k),
    "Q5_K": Kind(block=256, num_bytes=176, dequantize=_q5_k),
    "Q6_K": Kind(block=256, num_bytes=210, dequantize=_q6_k),
}
