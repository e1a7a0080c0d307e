"""Where blocks are kept that leave the KV cache: what every tier does, and the one in the machine's memory.

A tier is a bounded store of bytes by block name. It may lose or damage what it holds: whoever reads a block checks it
(stored_block.py). Methods are called from several threads.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from threading import Lock
from typing import Protocol

from .names import BlockName

Stored = bytes | memoryview


class Tier(Protocol):
    """A bounded store of blocks.

    capacity_bytes  the most that it holds; used_bytes: what it holds now
    outlives        whether it keeps them beyond this process
    changed         names that it let go of, or that others gave it, unasked: whoever reads them takes them away
    """

    capacity_bytes: int
    used_bytes: int
    outlives: bool
    changed: deque[BlockName]

    def __contains__(self, name: BlockName) -> bool:
        """Return whether get() may find it; one that is asked for often stays."""

    def put(self, name: BlockName, stored: Stored) -> list[tuple[BlockName, Stored]]:
        """Keep a block, letting go of those used least recently; return what the next tier may take.

        Raises OSError.
        """

    def get(self, name: BlockName) -> Stored | None:
        """Return a block, which counts as used now; None where it is not, or no more. Raises OSError."""

    def remove(self, name: BlockName) -> None:
        """Let go of a block that is damaged; nothing happens where there is none. Raises OSError."""

    def let_go(self) -> list[tuple[BlockName, Stored]]:
        """Return what would end with the process, what was used least recently first."""


class HostTier:
    """Blocks in the machine's memory, the least recently used first."""

    outlives = False

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.blocks: OrderedDict[BlockName, Stored] = OrderedDict()
        self.changed: deque[BlockName] = deque()
        self._lock = Lock()

    def __contains__(self, name: BlockName) -> bool:
        return name in self.blocks

    def put(self, name: BlockName, stored: Stored) -> list[tuple[BlockName, Stored]]:
        left = []
        with self._lock:
            self.used_bytes += len(stored) - len(self.blocks.pop(name, b""))
            self.blocks[name] = stored
            while self.used_bytes > self.capacity_bytes:
                left.append(self.blocks.popitem(last=False))
                self.used_bytes -= len(left[-1][1])
                self.changed.append(left[-1][0])
        return left

    def get(self, name: BlockName) -> Stored | None:
        with self._lock:
            if name in self.blocks:
                self.blocks.move_to_end(name)
            return self.blocks.get(name)

    def remove(self, name: BlockName) -> None:
        with self._lock:
            self.used_bytes -= len(self.blocks.pop(name, b""))

    def let_go(self) -> list[tuple[BlockName, Stored]]:
        return list(self.blocks.items())
