"""The paged KV cache's memory: one key and one value tensor a layer, planned in bytes before it is allocated."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheSpec:
    """The shape of one layer's cache; block 0 is the null block, which padding points at."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def bytes_per_block(self) -> int:
        return self.bytes_per_token * self.block_size

    def blocks_within(self, budget_bytes: int) -> int:
        """Return how many blocks fit in a budget. Raises ValueError when not even one besides the null block does."""
        blocks = budget_bytes // self.bytes_per_block
        if blocks < 2:
            raise ValueError(
                f"KV cache: a budget of {budget_bytes} bytes holds {blocks} blocks of {self.bytes_per_block} bytes,"
                " wanted at least 2; raise the memory budget or lower block_size"
            )
        return blocks

    def allocate(self, num_blocks: int, device: str) -> list[tuple[Tensor, Tensor]]:
        """Allocate zeroed caches, each (num_blocks, num_kv_heads, block_size, head_dim).

        On a CPU the memory is mapped, not touched: pages that no request reaches are never backed.
        """
        shape = (num_blocks, self.num_kv_heads, self.block_size, self.head_dim)

        def make() -> Tensor:
            if torch.device(device).type != "cpu":
                return torch.zeros(shape, dtype=self.dtype, device=device)
            pages = mmap.mmap(-1, math.prod(shape) * self.dtype.itemsize)
            return torch.frombuffer(pages, dtype=self.dtype).view(shape)

        return [(make(), make()) for _ in range(self.num_layers)]
