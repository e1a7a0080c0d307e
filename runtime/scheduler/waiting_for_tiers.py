"""Sequences that wait for blocks which a tier behind the KV cache has: others are planned meanwhile."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from seamwise.runtime.kv.offload import REASON

from .view import Admission, Candidate

if TYPE_CHECKING:
    from .scheduler import Scheduler


def begin_loads(scheduler: Scheduler, candidates: Iterable[Candidate]) -> bool:
    """Block the candidates of which a tier has more than the cache until that is loaded; return whether there is one.

    A sequence is loaded for once each time that it starts: what is evicted again before it does is computed.
    """
    offload, pool, began = scheduler.offload, scheduler.pool, False
    assert offload is not None
    for candidate in candidates:
        s = scheduler.waiting[candidate.arrival]
        if s.asks_tiers:
            load = offload.begin(pool, candidate.names, candidate.hits, len(scheduler.running) * len(pool.groups))
            if load is not None:
                s.asks_tiers = bool(load.waiting)  # beside another's load: it may want more than that
                load.waiting[s.arrival] = candidate.hits
                scheduler.block(s, REASON)
                began = True
    return began


def settle_loads(scheduler: Scheduler) -> None:
    """Let sequences start whose blocks are loaded, or could not be."""
    offload, pool = scheduler.offload, scheduler.pool
    assert offload is not None
    for load in offload.settle(pool):
        for arrival, before in load.waiting.items():
            s = scheduler.waiting.get(arrival)
            if s is not None:
                names = s.names_of_full_blocks(s.num_known - 1, pool.block_size)
                s.num_loaded += max(pool.hit_length(names) - before, 0) * pool.block_size
                if s.blocked == REASON:
                    scheduler.block(s, None)


def count_hits(scheduler: Scheduler, admissions: Iterable[Admission]) -> None:
    """Count the tokens of sequences that start which were asked of tiers, and those that came from there."""
    assert scheduler.offload is not None
    stats = scheduler.offload.stats
    for admission in admissions:
        s = scheduler.waiting[admission.arrival]
        cached = admission.hits * scheduler.pool.block_size
        loaded = min(s.num_loaded, cached)
        stats.queries += s.num_known - cached + loaded
        stats.hits += loaded
