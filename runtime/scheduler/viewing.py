"""Read a view off the scheduler's state. Work is in proportion to what runs and may start, not to what waits."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from seamwise.runtime.kv.pool import BlockPool

from .plan import shortlist
from .queue import Queue
from .sequence import NO_LIMIT, Sequence
from .view import Candidate, Progress, Shared, View, frozen

if TYPE_CHECKING:
    from .scheduler import Scheduler

_REFRESHED = 32  # waiting sequences whose cached prefix is looked up again for a step, in turn


def take_view(scheduler: Scheduler) -> View:
    """Return what the next plan may depend on."""
    slots, pool, limits = scheduler.slots, scheduler.pool, scheduler.config
    active = slots.active()
    scheduled, held = slots.scheduled[active], slots.held[active]
    pending = np.minimum(slots.known[active] + slots.drafts[active], slots.limit[active]) - scheduled
    max_chunk = slots.max_chunk[active]
    wanted = np.minimum(np.minimum(pending, max_chunk), limits.long_prefill_token_threshold or NO_LIMIT)
    own = np.zeros(len(active), dtype=np.int64)
    shared: Shared = ()
    missing = np.maximum(-(-(scheduled + wanted) // pool.block_size) - held, 0)
    if missing.sum() * len(pool.groups) > pool.num_available:
        own, shared = _what_they_would_free(pool, [slots.sequences[slot] for slot in active.tolist()])
    progress = Progress(
        slot=frozen(active), pending=frozen(pending), scheduled=frozen(scheduled),
        computed=frozen(slots.computed[active]), held=frozen(held), own=frozen(own), max_chunk=frozen(max_chunk),
    )  # fmt: skip
    budget = limits.max_num_batched_tokens - int(wanted.sum())
    seats = limits.max_num_seqs - len(active)
    may_start = min(seats, budget, len(scheduler.queue) - scheduler.queue.num_blocked)
    if may_start > 0:
        if scheduler.policy.reads_cached and pool.caching:
            _refresh_cached(scheduler)
        waiting, places = scheduler.queue.rows()
    else:
        waiting, places = _NOBODY, None
    view = View(
        step=scheduler.num_steps, clock=scheduler.clock, counters=frozen(scheduler.counters),
        block_size=pool.block_size, groups=pool.groups, num_blocks=pool.num_blocks,
        available=pool.num_available, coming=len(pool.fenced) + len(pool.leaving), running=slots.rows(active),
        progress=progress, shared=shared, waiting=waiting, candidates=(),
    )  # fmt: skip
    if may_start <= 0:
        return view
    chosen = shortlist(view, scheduler.policy, may_start)
    rows = chosen if places is None else places[chosen]
    found = _candidates(scheduler, [scheduler.queue.sequences[r] for r in rows.tolist()], budget)
    return View(**{name: getattr(view, name) for name in View.__slots__ if name != "candidates"}, candidates=found)


def _what_they_would_free(pool: BlockPool, running: list[Sequence | None]) -> tuple[np.ndarray, Shared]:
    """Return how many blocks each running sequence holds alone, and those that several of them hold and nobody else."""
    own = np.zeros(len(running), dtype=np.int64)
    rows_of: dict[int, list[int]] = {}
    for row, s in enumerate(running):
        assert s is not None
        for block in s.held_blocks:
            if block in pool.copying:
                continue
            if pool.holders[block] == 1:
                own[row] += 1
            else:
                rows_of.setdefault(block, []).append(row)
    shared = Counter(tuple(rows) for block, rows in rows_of.items() if len(rows) == pool.holders[block])
    return own, tuple(shared.items())


def _candidates(scheduler: Scheduler, sequences: list[Sequence], budget: int) -> tuple[Candidate, ...]:
    """Return the first of them, until they would fill the budget, with what the cache holds of each.

    A resting block that several would adopt is counted for the first: none starts past another.
    """
    pool = scheduler.pool
    found: list[Candidate] = []
    promised: set[bytes] = set()
    counted: set[int] = set()
    for s in sequences:
        if budget <= 0:
            break
        names = s.names_of_full_blocks(s.num_known - 1, pool.block_size) if pool.caching and s.reads_cache else []
        adopts = hits = pool.hit_length(names)
        while hits < len(names) and names[hits] in promised:
            hits += 1
        resting = [0] * len(pool.groups)
        for (group, _), block in pool.adopted(names, adopts, hits).items():  # behind a gap that another fills, too
            if block in pool.resting and block not in counted:
                resting[group] += 1
                counted.add(block)
        promised.update(names)
        budget -= min(s.num_known - hits * pool.block_size, s.max_chunk)
        candidate = Candidate(
            arrival=s.arrival, known=s.num_known, max_chunk=s.max_chunk, names=tuple(names), hits=adopts,
            resting=tuple(resting),
        )  # fmt: skip
        found.append(candidate)
    return tuple(found)


def _refresh_cached(scheduler: Scheduler) -> None:
    """Look up again what the cache holds of some waiting sequences, and keep that from being evicted first."""
    queue, pool = scheduler.queue, scheduler.pool
    count = len(queue)
    for turn in range(min(_REFRESHED, count)):
        s = queue.sequences[(scheduler.num_steps * _REFRESHED + turn) % count]
        names = s.names_of_full_blocks(s.num_known - 1, pool.block_size) if s.reads_cache else []
        hits = pool.hit_length(names)
        queue.set(s, "cached", hits * pool.block_size)
        for block in reversed(pool.adopted(names, hits).values()):
            if block in pool.resting:
                pool.resting.move_to_end(block)


_NOBODY = Queue().rows()[0]
