"""GGML's block formats, turned back into float32 by llama.cpp's own Python package.

A block of 32 has a scale and perhaps a minimum in float16; a block of 256 ("K") has quantized scales for its parts.
Source: gguf.quants, https://github.com/ggml-org/llama.cpp/tree/master/gguf-py; sizes: ggml-common.h there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


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
            raise RuntimeError(f"{self.name} weights need the gguf package: pip install 'seamwise[gguf]'") from error
        with np.errstate(all="ignore"):  # scales may be infinite in a file of no sense
            blocks = raw.view(-1, self.num_bytes).numpy()
            return torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType[self.name])).view(-1)


def unpack_q4_0(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Return 8 values plus 8 a word, the first in the lowest bits, int32 (N · 4,), and scales, float32 (N,)."""
    blocks = raw.view(-1, KINDS["Q4_0"].num_bytes)
    q = torch.cat((blocks[:, 2:] & 15, blocks[:, 2:] >> 4), 1)
    words = (q[:, ::2] | q[:, 1::2] << 4).contiguous().view(torch.int32)
    return words.view(-1), blocks[:, :2].contiguous().view(torch.float16).float().view(-1)


_BLOCKS = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "Q2_K": (256, 84),
    "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210), "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136), "MXFP4": (32, 17),
}  # fmt: skip
KINDS = {
    "F32": Kind(name="F32", block=1, num_bytes=4),
    "F16": Kind(name="F16", block=1, num_bytes=2, dtype=torch.float16),
    "BF16": Kind(name="BF16", block=1, num_bytes=2, dtype=torch.bfloat16),
    "F64": Kind(name="F64", block=1, num_bytes=8, dtype=torch.float64),
} | {name: Kind(name=name, block=block, num_bytes=size) for name, (block, size) in _BLOCKS.items()}
