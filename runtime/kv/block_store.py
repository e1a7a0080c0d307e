"""The tiers behind a process's part of the KV cache: it copies blocks to them, and reads them back verified.

    cache ──copied──► host memory ──least recently used──► disk
    cache ◄──verified──────────── either of them

In three threads, each in order: one reads the cache, one fills tiers, one loads.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import numpy as np

from .names import BlockName
from .stored_block import HEAD_BYTES, DamagedBlock, layout_digest, opened, seal
from .tiers import Stored, Tier

_UNWRITTEN_BYTES = 256 << 20  # of copies that no tier has taken yet: a slow disk then costs blocks, not memory
_TOGETHER = 64  # blocks that are read or written at once
logger = logging.getLogger("seamwise.kv")


class BlockMemory(Protocol):
    """What has the cache's blocks: a ModelRunner, or anything that stands for one.

    kv_block_bytes  of a block, of all layers that share it
    kv_layout       what these bytes are: dtype, shapes, layers, and the program that computes them
    """

    @property
    def kv_block_bytes(self) -> int: ...

    @property
    def kv_layout(self) -> str: ...

    def read_kv_blocks(self, blocks: Sequence[int]) -> np.ndarray:
        """Return the bytes of blocks, (n, kv_block_bytes) uint8, in memory of their own."""

    def write_kv_blocks(self, blocks: Sequence[int], data: np.ndarray) -> None:
        """Write what read_kv_blocks gave."""


class BlockStore:
    """The tiers of this process, in the order in which they are asked and filled.

    layout    what blocks are; outlives: whether they are kept beyond this process
    failed    how many blocks a tier could not take, or give
    told      called in a thread with names that tiers were given or have let go of, and whether one has each now
    """

    def __init__(
        self, memory: BlockMemory, tiers: Sequence[Tier],
        executor: Callable[[], Executor] = lambda: ThreadPoolExecutor(1, "seamwise-kv"),
    ) -> None:  # fmt: skip
        self.memory, self.tiers = memory, tiers
        self.layout, self.outlives = memory.kv_layout, tiers[-1].outlives
        self.failed = 0
        self.told: Callable[[dict[BlockName, bool]], None] = lambda news: None
        self._layout = layout_digest(self.layout)
        self._copier, self._writer, self._loader = executor(), executor(), executor()
        self._unwritten = 0
        self._lock = threading.Lock()

    def __contains__(self, name: BlockName) -> bool:
        """Return whether load() may find a block."""
        return any(name in tier for tier in self.tiers)

    def copy(self, blocks: Sequence[int], names: Sequence[BlockName]) -> Future[int]:
        """Begin to copy blocks of the cache; done when they have been read and may change, with how many were: those
        that are too many for tiers to take in time are left."""
        return self._copier.submit(self._copy, blocks, names)

    def load(self, blocks: Mapping[BlockName, int]) -> Future[list[BlockName]]:
        """Begin to read, check and write blocks of the cache; done with the names of those that it then has."""
        return self._loader.submit(self._load, blocks)

    def keep(self, resting: Sequence[tuple[int, BlockName]]) -> int:
        """Give the last tier what those before it hold, and then these blocks of the cache, as much of it as was used
        last; return how many blocks were copied."""
        last = self.tiers[-1]
        kept: list[Any] = [one for tier in self.tiers[:-1] for one in tier.let_go()]
        kept += [one for one in resting if one[1] not in last]
        kept = kept[-(last.capacity_bytes // (HEAD_BYTES + self.memory.kv_block_bytes)) :]
        copied = [one for one in kept if isinstance(one[0], int)]
        self._put_down(len(self.tiers) - 1, kept[: len(kept) - len(copied)])
        left = copied
        while left:
            left = left[self._copy(*zip(*left[:_TOGETHER], strict=True)) :]
            self._wait(self._writer)
        return len(copied)

    def wait(self, written: bool) -> None:
        """Wait until the cache is neither read nor written any more and, if asked, until tiers have what was read."""
        self._wait(self._copier, self._loader)
        if written:
            self._wait(self._writer)

    def close(self) -> None:
        """End the threads."""
        for thread in (self._copier, self._writer, self._loader):
            thread.shutdown()

    def tell(self, names: Sequence[BlockName] = ()) -> None:
        """Say of these names, and of those that tiers say have changed, whether a tier has them."""
        with self._lock:  # what is told later is later
            changed = {*names}
            for tier in self.tiers:
                while tier.changed:
                    changed.add(tier.changed.popleft())
            self.told({name: name in self for name in changed})

    def _wait(self, *threads: Executor) -> None:
        """Wait until all that was given to these threads is done."""
        wait([thread.submit(int) for thread in threads])

    def _copy(self, blocks: Sequence[int], names: Sequence[BlockName]) -> int:
        count = min(len(blocks), max(_UNWRITTEN_BYTES // self.memory.kv_block_bytes, 1) - self._unwritten)
        if count > 0:
            data = self.memory.read_kv_blocks(blocks[:count])
            with self._lock:
                self._unwritten += count
            self._writer.submit(self._put, names[:count], data).add_done_callback(_report)
        return max(count, 0)

    def _put(self, names: Sequence[BlockName], data: np.ndarray) -> None:
        for name, row in zip(names, data, strict=True):
            stored = np.empty(HEAD_BYTES + len(row), dtype=np.uint8)
            stored[HEAD_BYTES:] = row
            seal(stored.data, name, self._layout)
            self._put_down(0, [(name, stored.data)])
            with self._lock:
                self._unwritten -= 1
        self.tell(names)

    def _put_down(self, first: int, left: Sequence[tuple[BlockName, Stored]]) -> None:
        """Give blocks to a tier, and what it lets go of to the next one."""
        for tier in self.tiers[first:]:
            following = []
            for name, stored in left:
                try:
                    following += tier.put(name, stored) if name not in tier else []
                except OSError as error:
                    self._fail(f"a block of the KV cache could not be kept: {error}")
            left = following

    def _load(self, blocks: Mapping[BlockName, int]) -> list[BlockName]:
        loaded: list[BlockName] = []
        asked = list(blocks)
        for start in range(0, len(asked), _TOGETHER):
            found = [(name, data) for name in asked[start : start + _TOGETHER] if (data := self._fetch(name))]
            if found:
                rows = np.stack([np.frombuffer(data, dtype=np.uint8) for _, data in found])
                self.memory.write_kv_blocks([blocks[name] for name, _ in found], rows)
                loaded += [name for name, _ in found]
        self.tell([*blocks.keys() - set(loaded)])
        return loaded

    def _fetch(self, name: BlockName) -> memoryview | None:
        """Return a block's bytes from the first tier that has it whole."""
        for tier in self.tiers:
            try:
                stored = tier.get(name)
                if stored is not None:
                    return opened(memoryview(stored), name, self._layout, self.memory.kv_block_bytes)
            except OSError as error:
                self._fail(f"a block of the KV cache could not be read: {error}")
            except DamagedBlock as error:
                logger.warning("a stored block of the KV cache, %s, is computed again: %s", name.hex(), error)
                tier.remove(name)
        return None

    def _fail(self, problem: str) -> None:
        logger.warning("%s", problem)
        with self._lock:
            self.failed += 1


def _report(future: Future[None]) -> None:
    if (error := future.exception()) is not None:
        logger.error("blocks of the KV cache were not kept", exc_info=error)
