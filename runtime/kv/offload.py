"""Between the KV cache and the tiers behind it: what is about to leave the cache is kept, what is asked for comes back.

    resting, next to be evicted ──copy──► host memory ──least recently used──► disk     (in threads)
    cache  ◄──verified, published──────────── either of them: meanwhile the request is blocked, "kv load"

Nothing is copied before the cache is so full that the next step may evict. A copy reads a block that nobody may take
(BlockPool.copying); a load writes blocks that it alone holds, under a lease. Whatever is not there, or not what its
name says, is computed. A block's name holds the weights, the program and all tokens before it, so a tier never needs
to be told that something has changed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import numpy as np

from .hits import longest_hit, name_in
from .names import BlockName
from .pool import BlockPool
from .stored_block import HEAD_BYTES, DamagedBlock, layout_digest, opened, seal
from .tiers import Stored, Tier

REASON = "kv load"  # why a request is blocked meanwhile
_PENDING_BYTES = 256 << 20  # of copies that no tier has taken yet: a slow disk then costs blocks, not memory
_TOGETHER = 64  # blocks that are read or written at once
logger = logging.getLogger("seamwise.kv")


class BlockMemory(Protocol):
    """What has the cache's blocks: a ModelRunner, or anything that stands for one.

    kv_block_bytes  of a block, of all layers that share it
    kv_layout       what these bytes are: dtype, shapes, layers, and the program that computes them
    """

    kv_block_bytes: int
    kv_layout: str

    def read_kv_blocks(self, blocks: Sequence[int]) -> np.ndarray:
        """Return the bytes of blocks, (n, kv_block_bytes) uint8, in memory of their own."""

    def write_kv_blocks(self, blocks: Sequence[int], data: np.ndarray) -> None:
        """Write what read_kv_blocks gave."""


@dataclass(slots=True, kw_only=True)
class OffloadStats:
    """Counts since the start.

    queries, hits  tokens that the cache did not have of requests that started, and those of them that were loaded
    stored, loaded  blocks copied out of the cache, and brought back
    lost     blocks that were in a tier and could not be read: gone since, damaged, or of another layout
    failed   blocks that a tier could not take, or give, as on a full disk
    """

    queries: int = 0
    hits: int = 0
    stored: int = 0
    loaded: int = 0
    lost: int = 0
    failed: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class Load:
    """Blocks on their way into the cache: by name, where each goes; done: those that are there. waiting: requests'
    arrivals, and the blocks that the cache had of each before."""

    lease: str
    blocks: dict[BlockName, int]
    done: Future[list[BlockName]]
    waiting: dict[int, int] = field(default_factory=dict)


class Offload:
    """The tiers of one engine. All but what threads do is called where the pool is changed.

    tiers     in the order in which they are asked and filled
    ahead     blocks that the steps under way and the next may evict: so many of those next to be evicted are copied
    min_tokens  what is shorter is computed rather than loaded
    ready     called in a thread when a copy or a load has ended
    """

    def __init__(
        self, memory: BlockMemory, tiers: Sequence[Tier], *, ahead: int, min_tokens: int = 1,
        executor: Callable[[], Executor] = lambda: ThreadPoolExecutor(1, "seamwise-kv"),
    ) -> None:  # fmt: skip
        self.memory, self.tiers, self.ahead, self.min_tokens = memory, tiers, ahead, min_tokens
        self.stats = OffloadStats()
        self.ready: Callable[[], None] = lambda: None
        self.loads: list[Load] = []
        self.layout = memory.kv_layout
        self._layout = layout_digest(self.layout)
        self._copier, self._writer, self._loader = executor(), executor(), executor()  # each in order
        self._copies: list[tuple[list[int], Future[None]]] = []
        self._pending: set[BlockName] = set()  # copied or being copied, and in no tier yet
        self._lock = threading.Lock()
        self._num_loads = 0

    @property
    def outlives(self) -> bool:
        """Whether blocks are kept beyond this process."""
        return self.tiers[-1].outlives

    def __contains__(self, name: BlockName) -> bool:
        return any(name in tier for tier in self.tiers)

    def store_ahead(self, pool: BlockPool) -> None:
        """Begin to copy the resting blocks that the next step may evict and that no tier has.

        Each once until it is used again: a tier that loses what it is given keeps no block from being handed out.
        """
        near = list(islice(pool.resting, max(self.ahead - len(pool.free), 0)))
        pool.kept.update(block for block in near if block not in pool.kept and pool.names[block] in self)
        room = _PENDING_BYTES // self.memory.kv_block_bytes - len(self._pending)
        found = [b for b in near if b not in pool.kept and pool.names[b] not in self._pending][: max(room, 0)]
        if found:
            names = [pool.names[block] for block in found]
            self._pending.update(names)
            for block in found:
                pool.copy(block)
            self._copies.append((found, self._submit(self._copier, self._copy, found, names)))

    def wanted(self, pool: BlockPool, names: Sequence[BlockName], hits: int) -> tuple[list[BlockName], int]:
        """Return what to load for a request of which the cache has `hits` blocks, and how many it then has.

        Nothing, where too few tokens would be gained.
        """
        best = longest_hit(pool.groups, pool.block_size, names, _Either(pool.by_name, self))
        if best <= hits or (best - hits) * pool.block_size < self.min_tokens:
            return [], hits
        needed = [
            name_in(names[index], g)
            for g, group in enumerate(pool.groups)
            for index in range(int(group.first_needed(best * pool.block_size)) // pool.block_size, best)
        ]
        return [name for name in needed if name not in pool.by_name], best

    def begin(self, pool: BlockPool, names: Sequence[BlockName], hits: int, reserve: int) -> Load | None:
        """Begin to load what a request wants, or return the load that brings some of it; None: compute it.

        reserve  blocks that must stay available
        """
        wanted, best = self.wanted(pool, names, hits)
        if not wanted:
            return None
        for load in self.loads:
            if not load.blocks.keys().isdisjoint(wanted):
                return load
        kept = [block for block in pool.adopted(names, best).values() if block not in pool.promised]
        if len(wanted) + sum(block in pool.resting for block in kept) > pool.num_available - reserve:
            return None
        self._num_loads += 1
        lease = f"{REASON} {self._num_loads}"
        blocks = dict(zip(wanted, pool.take_leased(lease, kept, len(wanted)), strict=True))
        load = Load(lease=lease, blocks=blocks, done=self._submit(self._loader, self._load, blocks))
        self.loads.append(load)
        return load

    def settle(self, pool: BlockPool) -> list[Load]:
        """Take back what copies have read, publish what was loaded; return the loads that have ended."""
        for copy in [copy for copy in self._copies if copy[1].done()]:
            copy[1].result()
            for block in reversed(copy[0]):
                pool.copied(block)
            self._copies.remove(copy)
        ended = [load for load in self.loads if load.done.done()]
        for load in ended:
            for name in load.done.result():
                pool.publish(load.blocks[name], name)
            pool.end_lease(load.lease)
            self.loads.remove(load)
        return ended

    def finish(self) -> None:
        """Wait until nothing reads or writes the cache any more; settle() is the caller's."""
        self._wait(self._copier, self._loader)

    def forget(self, pool: BlockPool) -> list[str]:
        """Forget all that is under way, whatever of it was noted; return the leases of loads."""
        self._wait(self._copier, self._loader)
        self._wait(self._writer)
        self._copies, self.loads, self._pending = [], [], set()
        return [lease for lease in pool.leases if lease.startswith(REASON)]

    def close(self, pool: BlockPool) -> None:
        """Keep what cache and tiers hold, as much of it as was used last, where it outlives the process; end threads.

        No step is under way.
        """
        self.forget(pool)
        if self.outlives:
            last = self.tiers[-1]
            kept: list[Any] = [one for tier in self.tiers[:-1] for one in tier.let_go()]
            kept += [block for block in pool.resting if pool.names[block] not in last]
            kept = kept[-(last.capacity_bytes // (HEAD_BYTES + self.memory.kv_block_bytes)) :]
            for name, stored in (one for one in kept if not isinstance(one, int)):
                self._put_down(len(self.tiers) - 1, [(name, stored)])
            blocks = [one for one in kept if isinstance(one, int)]
            for start in range(0, len(blocks), _TOGETHER):
                self._copy(part := blocks[start : start + _TOGETHER], [pool.names[block] for block in part])
                self._wait(self._writer)
        for thread in (self._copier, self._writer, self._loader):
            thread.shutdown()

    def _submit(self, thread: Executor, work: Callable[..., Any], *given: Any) -> Future[Any]:
        future = thread.submit(work, *given)
        future.add_done_callback(lambda _: self.ready())
        return future

    def _wait(self, *threads: Executor) -> None:
        """Wait until all that was given to these threads is done."""
        wait([thread.submit(int) for thread in threads])

    def _copy(self, blocks: Sequence[int], names: Sequence[BlockName]) -> None:
        data = self.memory.read_kv_blocks(blocks)
        self._writer.submit(self._put, names, data).add_done_callback(_tell)

    def _put(self, names: Sequence[BlockName], data: np.ndarray) -> None:
        for name, row in zip(names, data, strict=True):
            stored = np.empty(HEAD_BYTES + len(row), dtype=np.uint8)
            stored[HEAD_BYTES:] = row
            seal(stored.data, name, self._layout)
            self._put_down(0, [(name, stored.data)])
            self._count("stored")
            self._pending.discard(name)

    def _put_down(self, first: int, left: list[tuple[BlockName, Stored]]) -> None:
        """Give blocks to a tier, and what it lets go of to the next one."""
        for tier in self.tiers[first:]:
            following = []
            for name, stored in left:
                try:
                    following += tier.put(name, stored) if name not in tier else []
                except OSError as error:
                    self._count("failed", f"a block of the KV cache could not be kept: {error}")
            left = following

    def _load(self, blocks: dict[BlockName, int]) -> list[BlockName]:
        """Read, check and write blocks; return the names of those that the cache now has."""
        loaded: list[BlockName] = []
        asked = list(blocks)
        for start in range(0, len(asked), _TOGETHER):
            found = [(name, data) for name in asked[start : start + _TOGETHER] if (data := self._fetch(name))]
            if found:
                rows = np.stack([np.frombuffer(data, dtype=np.uint8) for _, data in found])
                self.memory.write_kv_blocks([blocks[name] for name, _ in found], rows)
                loaded += [name for name, _ in found]
        self._count("loaded", number=len(loaded))
        return loaded

    def _fetch(self, name: BlockName) -> memoryview | None:
        """Return a block's bytes from the first tier that has it whole."""
        for tier in self.tiers:
            try:
                stored = tier.get(name)
                if stored is not None:
                    return opened(memoryview(stored), name, self._layout, self.memory.kv_block_bytes)
            except OSError as error:
                self._count("failed", f"a block of the KV cache could not be read: {error}")
            except DamagedBlock as error:
                logger.warning("a stored block of the KV cache, %s, is computed again: %s", name.hex(), error)
                tier.remove(name)
        self._count("lost")
        return None

    def _count(self, name: str, problem: str = "", number: int = 1) -> None:
        if problem:
            logger.warning("%s", problem)
        with self._lock:
            setattr(self.stats, name, getattr(self.stats, name) + number)


class _Either:
    """Names that one or the other has."""

    def __init__(self, *found: Any) -> None:
        self._found = found

    def __contains__(self, name: object) -> bool:
        return any(name in one for one in self._found)


def _tell(future: Future[None]) -> None:
    if (error := future.exception()) is not None:
        logger.error("blocks of the KV cache were not kept", exc_info=error)
