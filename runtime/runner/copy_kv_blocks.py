"""The bytes of KV cache blocks, out of the cache and back into it, on any device: one tensor's after the other's.

On a GPU both run on the current stream, behind what was launched before and before what comes later.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


@torch.inference_mode()
def read_blocks(caches: Sequence[Tensor], blocks: Sequence[int]) -> np.ndarray:
    """Return (n, bytes) uint8: of each block its rows of all caches, which are (blocks, *shape of a block's row)."""
    index = torch.tensor(blocks, device=caches[0].device)
    read: np.ndarray = torch.cat([cache.view(torch.uint8)[index].flatten(1) for cache in caches], dim=1).cpu().numpy()
    return read


@torch.inference_mode()
def write_blocks(caches: Sequence[Tensor], blocks: Sequence[int], data: np.ndarray) -> None:
    """Write to blocks what read_blocks gave."""
    index = torch.tensor(blocks, device=caches[0].device)
    rows = [cache.view(torch.uint8) for cache in caches]
    parts = torch.from_numpy(data).to(index.device).split([row[0].numel() for row in rows], dim=1)
    for row, part in zip(rows, parts, strict=True):
        row[index] = part.view(len(blocks), *row.shape[1:])
