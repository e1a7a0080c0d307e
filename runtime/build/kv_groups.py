"""Groups of layers that need the same of a request's past, and what follows for the blocks of one pool.

A block holds block_size tokens of the layers of one group; all groups take theirs from one pool, each at the same
indices of a table of its own. What no later token reads returns at once, so that of a window a few blocks are held:

    full, latent     0 1 2 3 4 5 6 7 8         sliding window, chunked local     . . . . . 5 6 7 8

Source: groups as in vLLM's hybrid cache, https://docs.vllm.ai/en/latest/design/hybrid_kv_cache_manager.html
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Kind = Literal["full", "latent", "sliding_window", "chunked_local"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KVGroup:
    """What the token at a position reads of those before it.

    kind  "full", "latent" (MLA): all; "sliding_window": the last `size`, its own among them; "chunked_local": those of
          its chunk, which begins at a multiple of `size`
    size  in tokens; 0 where all is read
    """

    kind: Kind = "full"
    size: int = 0

    def __post_init__(self) -> None:
        if (self.size > 0) != (self.kind in ("sliding_window", "chunked_local")) or self.size < 0:
            raise ValueError(f"KVGroup: kind={self.kind!r} with size={self.size}; only windows and chunks have a size")

    def first_needed(self, position: Any) -> Any:
        """Return the first token that the one at `position`, and those after it, read: a number or an array of them."""
        if self.kind == "chunked_local":
            return position // self.size * self.size
        return np.maximum(position - self.size + 1, 0) if self.size else position * 0


FULL = KVGroup()
Groups = tuple[KVGroup, ...]


def most_held(group: KVGroup, block_size: int, total: Any, ahead: Any) -> Any:
    """Return the most blocks that a sequence of `total` tokens holds, its last `ahead` being computed or under way."""
    every = -(-total // block_size)
    return np.minimum(every, -(-(group.size - 1 + ahead) // block_size) + 1) if group.size else every


def blocks_of(groups: Groups, block_size: int, total: int, chunk: int) -> int:
    """Return the most blocks that a request of `total` tokens holds, two chunks of it being under way at once."""
    return sum(int(most_held(g, block_size, total, min(total, 2 * chunk))) for g in groups)


def most_tokens(groups: Groups, block_size: int, num_blocks: int, chunk: int, longest: int) -> int:
    """Return the greatest length, `longest` at most, of a request that has as many blocks to itself."""
    low, high = 0, longest
    while low < high:
        middle = (low + high + 1) // 2
        fits = blocks_of(groups, block_size, middle, chunk) <= num_blocks
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
