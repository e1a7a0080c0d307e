"""A runner's KV cache: each layer's tensors, and the bytes of blocks, out of them and back, on any device.

On a GPU reading and writing run on the current stream, behind what was launched before and before what comes later.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class KVCache:
    """The memory of what steps computed before.

    layers      each layer's tensors, (blocks, *shape of a block's row); [] before they are there, and on a GPU asleep
    flat        the same, one behind the other, as programs take them
    num_blocks  the null block included; 0 before they were there
    """

    def __init__(self) -> None:
        self.num_blocks = 0
        self.layers: list[list[Tensor]] = []
        self.flat: list[Tensor] = []

    def hold(self, layers: list[list[Tensor]], num_blocks: int) -> None:
        """Use these tensors, as KVCacheSpec allocates them."""
        self.layers, self.num_blocks = layers, num_blocks
        self.flat = [tensor for layer in layers for tensor in layer]

    @property
    def _stored(self) -> list[Tensor]:
        """Each tensor once: groups of layers share theirs."""
        return [*{id(tensor): tensor for tensor in self.flat}.values()]

    @torch.inference_mode()
    def read(self, blocks: Sequence[int]) -> np.ndarray:
        """Return (n, bytes) uint8: of each block its rows of all tensors."""
        stored = self._stored
        index = torch.tensor(blocks, device=stored[0].device)
        rows = [tensor.view(torch.uint8)[index].flatten(1) for tensor in stored]
        read: np.ndarray = torch.cat(rows, dim=1).cpu().numpy()
        return read

    @torch.inference_mode()
    def write(self, blocks: Sequence[int], data: np.ndarray) -> None:
        """Write to blocks what `read` gave."""
        rows = [tensor.view(torch.uint8) for tensor in self._stored]
        index = torch.tensor(blocks, device=rows[0].device)
        parts = torch.from_numpy(data).to(index.device).split([row[0].numel() for row in rows], dim=1)
        for row, part in zip(rows, parts, strict=True):
            row[index] = part.view(len(blocks), *row.shape[1:])
