"""Which request holds which KV cache blocks, with prefix caching.

A full block is named by the hash of its tokens and of the block before it; a block that no request holds keeps its
contents until it is needed for something else, least recently used first.
Source: vLLM's automatic prefix caching, https://docs.vllm.ai/en/latest/design/prefix_caching.html
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

NULL_BLOCK = 0  # padding points here; it is never handed out

BlockName = bytes
ROOT: BlockName = b""


def name_after(parent: BlockName, tokens: np.ndarray) -> BlockName:
    """Return the name of a full block with these int64 tokens after the block named `parent` (128 bits)."""
    return hashlib.blake2b(parent + tokens.tobytes(), digest_size=16).digest()


@dataclass(slots=True, kw_only=True)
class BlockPool:
    """All blocks of the cache. A block is free (unnamed), resting (named, held by none) or held (by one or more).

    names   block -> its content's name, for full blocks when caching; by_name is the inverse
    holders block -> how many requests hold it
    """

    num_blocks: int
    block_size: int
    caching: bool = True
    free: list[int] = field(init=False)
    resting: OrderedDict[int, None] = field(init=False, default_factory=OrderedDict)
    holders: dict[int, int] = field(init=False, default_factory=dict)
    names: dict[int, BlockName] = field(init=False, default_factory=dict)
    by_name: dict[BlockName, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_blocks < 2:
            raise ValueError(f"num_blocks={self.num_blocks}: wanted at least 2 (block 0 holds padding)")
        self.free = list(range(self.num_blocks - 1, NULL_BLOCK, -1))

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out now."""
        return len(self.free) + len(self.resting)

    def check(self) -> None:
        """Assert that every block but the null block is in exactly one state."""
        states = [*self.free, *self.resting, *self.holders]
        assert sorted(states) == list(range(1, self.num_blocks)), "a block is lost or in two states"
        assert all(count > 0 for count in self.holders.values())
        assert {b: n for n, b in self.by_name.items()} == self.names
        assert not set(self.free) & self.names.keys()

    def take(self, count: int) -> list[int]:
        """Hand out `count` blocks with undefined contents. The caller has checked num_available."""
        assert count <= self.num_available, "more blocks asked for than are available"
        taken = []
        for _ in range(count):
            if self.free:
                block = self.free.pop()
            else:
                block, _ = self.resting.popitem(last=False)
                del self.by_name[self.names.pop(block)]
            self.holders[block] = 1
            taken.append(block)
        return taken

    def hold(self, block: int) -> None:
        """Let one more request hold a named block."""
        self.resting.pop(block, None)
        self.holders[block] = self.holders.get(block, 0) + 1

    def release(self, blocks: Sequence[int]) -> None:
        """Give back a request's blocks, its last first, so that a prefix outlives what follows it."""
        for block in reversed(blocks):
            self.holders[block] -= 1
            if self.holders[block]:
                continue
            del self.holders[block]
            if block in self.names:
                self.resting[block] = None
            else:
                self.free.append(block)

    def longest_prefix(self, names: Iterable[BlockName]) -> list[int]:
        """Return the cached blocks of the longest run of names from the first."""
        found: list[int] = []
        for name in names:
            block = self.by_name.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def forget(self, block: int) -> None:
        """Take a held block's name away: its contents are not what the name says."""
        if block in self.names:
            del self.by_name[self.names.pop(block)]

    def forget_all(self) -> None:
        """Take all names away; what no request holds is free."""
        self.names.clear()
        self.by_name.clear()
        self.free += self.resting
        self.resting.clear()

    def record(self, block: int, name: BlockName) -> None:
        """Name a block that is now full, unless it or an equal block is named already."""
        if self.caching and name not in self.by_name and block not in self.names:
            self.by_name[name] = block
            self.names[block] = name
