"""Between the KV cache and the tiers behind it: what is about to leave the cache is kept, what is asked for comes back.

    resting, next to be evicted ──copy──► a store (block_store.py: host memory, disk)
    cache  ◄──verified, published──────── meanwhile the request is blocked, "kv load"

Nothing is copied before the cache is so full that the next step may evict. A copy reads a block that nobody may take
(BlockPool.copying); a load writes blocks that it alone holds, under a lease. Whatever is not there, or not what its
name says, is computed. A block's name holds the weights, the program and all tokens before it, so a tier never needs
to be told that something has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from .block_store import BlockStore
from .hits import longest_hit, name_in
from .names import BlockName
from .pool import BlockPool
from .rank_stores import RankStores

REASON = "kv load"  # why a request is blocked meanwhile


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

    store     what copies blocks and brings them back
    ahead     blocks that the steps under way and the next may evict: so many of those next to be evicted are copied
    min_tokens  what is shorter is computed rather than loaded
    ready     called in a thread when a copy or a load has ended
    """

    def __init__(self, store: BlockStore | RankStores, *, ahead: int, min_tokens: int = 1) -> None:
        self.store, self.ahead, self.min_tokens = store, ahead, min_tokens
        self.stats = OffloadStats()
        self.ready: Callable[[], None] = lambda: None
        self.loads: list[Load] = []
        self.layout, self.outlives = store.layout, store.outlives
        self._copies: list[tuple[list[int], Future[int]]] = []
        self._num_loads = 0

    def store_ahead(self, pool: BlockPool) -> None:
        """Begin to copy the resting blocks that the next step may evict and that no tier has.

        Each once until it is used again: a tier that loses what it is given keeps no block from being handed out.
        """
        near = list(islice(pool.resting, max(self.ahead - len(pool.free), 0)))
        pool.kept.update(block for block in near if block not in pool.kept and pool.names[block] in self.store)
        found = [block for block in near if block not in pool.kept]
        if found:
            for block in found:
                pool.copy(block)
            self._copies.append((found, self._told(self.store.copy(found, [pool.names[b] for b in found]))))

    def wanted(self, pool: BlockPool, names: Sequence[BlockName], hits: int) -> tuple[list[BlockName], int]:
        """Return what to load for a request of which the cache has `hits` blocks, and how many it then has.

        Nothing, where too few tokens would be gained.
        """
        best = longest_hit(pool.groups, pool.block_size, names, _Either(pool.by_name, self.store))
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
        load = Load(lease=lease, blocks=blocks, done=self._told(self.store.load(blocks)))
        self.loads.append(load)
        return load

    def settle(self, pool: BlockPool) -> list[Load]:
        """Take back what copies have read, publish what was loaded; return the loads that have ended."""
        for copy in [copy for copy in self._copies if copy[1].done()]:
            self.stats.stored += copy[1].result()
            for block in reversed(copy[0]):
                pool.copied(block)
            self._copies.remove(copy)
        ended = [load for load in self.loads if load.done.done()]
        for load in ended:
            loaded = load.done.result()
            for name in loaded:
                pool.publish(load.blocks[name], name)
            pool.end_lease(load.lease)
            self.loads.remove(load)
            self.stats.loaded += len(loaded)
            self.stats.lost += len(load.blocks) - len(loaded)
        self.stats.failed = self.store.failed
        return ended

    def finish(self) -> None:
        """Wait until nothing reads or writes the cache any more; settle() is the caller's."""
        self.store.wait(written=False)

    def forget(self, pool: BlockPool) -> list[str]:
        """Forget all that is under way, whatever of it was noted; return the leases of loads."""
        self.store.wait(written=True)
        self._copies, self.loads = [], []
        return [lease for lease in pool.leases if lease.startswith(REASON)]

    def close(self, pool: BlockPool) -> None:
        """Keep what cache and tiers hold, as much of it as was used last, where it outlives the process; end threads.

        No step is under way.
        """
        self.forget(pool)
        if self.outlives:
            self.stats.stored += self.store.keep([(block, pool.names[block]) for block in pool.resting])
        self.stats.failed = self.store.failed
        self.store.close()

    def _told(self, future: Future[Any]) -> Future[Any]:
        future.add_done_callback(lambda _: self.ready())
        return future


class _Either:
    """Names that one or the other has."""

    def __init__(self, *found: Any) -> None:
        self._found = found

    def __contains__(self, name: object) -> bool:
        return any(name in one for one in self._found)
