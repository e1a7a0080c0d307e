"""Carry out a plan, and what comes of it: the only code that changes pool, slots and counters.

    commit(plan)     preempt, adopt, take blocks, advance `scheduled`             -> Step
    complete(step)   append what was sampled, advance `computed`, publish names
    undo()           after a step that failed: all that is under way starts over

Any exception inside leaves the caller with `Scheduler.rebuild`.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Series
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from seamwise.runtime.kv.hits import name_in
from seamwise.runtime.kv.names import BlockName
from seamwise.runtime.kv.pool import BlockPool

from .sequence import Sequence
from .view import Plan

if TYPE_CHECKING:
    from .scheduler import Scheduler


@dataclass(slots=True, kw_only=True, eq=False)
class Step:
    """A committed plan: R sequences, each computing `counts` tokens after its first `firsts`.

    slots, epochs  (R,) where each runs, and which owner of the slot it is
    firsts, counts (R,) int64
    yields         (R,) bool: the last known token is among these, so a token is sampled after it
    drafts         (R,) how many of these are guesses behind the last known one: a token is sampled after each; proposed
                   has them by index
    fills          blocks that the step fills with known tokens, and the names promised for them
    """

    number: int
    sequences: list[Sequence]
    slots: np.ndarray
    epochs: np.ndarray
    firsts: np.ndarray
    counts: np.ndarray
    yields: np.ndarray
    drafts: np.ndarray
    proposed: dict[int, list[int]]
    fills: list[tuple[int, BlockName]] = field(default_factory=list)


def commit(scheduler: Scheduler, plan: Plan) -> Step | None:
    """Change pool, queue and slots as the plan says; return the step to compute."""
    slots, pool, size = scheduler.slots, scheduler.pool, scheduler.pool.block_size
    for slot in plan.preemptions:
        victim = slots.sequences[slot]
        assert victim is not None
        victim.num_preemptions += 1
        requeue(scheduler, victim)
    starting = [scheduler.waiting[a.arrival] for a in plan.admissions]
    adopted = []  # held before anything is taken: taking could evict it
    for s, admission in zip(starting, plan.admissions, strict=True):
        adopted.append(pool.adopted(s.names, admission.hits))
        for block in adopted[-1].values():
            pool.hold(block)
    granted = np.array(plan.grants, dtype=np.int64).reshape(-1, 2)
    rows, counts = granted[:, 0], granted[:, 1]
    missing = -(-(slots.scheduled[rows] + counts) // size) - slots.held[rows]
    for i in (missing > 0).nonzero()[0].tolist():
        running = slots.sequences[rows[i]]
        assert running is not None
        slots.extend(running, take_blocks(pool, int(missing[i])))
    fills: list[tuple[int, BlockName]] = []
    for i in (counts > 1).nonzero()[0].tolist():
        _promise(scheduler, slots.sequences[rows[i]], int(slots.scheduled[rows[i]] + counts[i]), fills)
    for s, admission, blocks in zip(starting, plan.admissions, adopted, strict=True):
        _start(scheduler, s, admission.hits, admission.count, blocks, fills)
    if not plan:
        return None
    rows = np.concatenate([rows, np.array([s.slot for s in starting], dtype=np.int64)])
    counts = np.concatenate([counts, np.array([a.count for a in plan.admissions], dtype=np.int64)])
    firsts = slots.scheduled[rows]
    ends, known = firsts + counts, slots.known[rows]
    yields, drafts = ends >= known, np.maximum(ends - known, 0)
    proposed = {
        i: slots.tokens[rows[i], known[i] : ends[i]].tolist() for i in drafts.nonzero()[0].tolist()
    }  # fmt: skip
    slots.drafts[rows] = drafts
    slots.scheduled[rows] += counts
    slots.known[rows] += yields
    scheduler.num_steps += 1
    scheduler.clock += int(counts.sum())
    step = Step(
        number=scheduler.num_steps, sequences=[slots.sequences[slot] for slot in rows.tolist()],
        slots=rows, epochs=slots.epoch[rows], firsts=firsts, counts=counts, yields=yields,
        drafts=drafts, proposed=proposed, fills=fills,
    )  # fmt: skip
    scheduler.flying.append(step)
    return step


def _start(
    scheduler: Scheduler, s: Sequence, hits: int, count: int, found: dict[tuple[int, int], int],
    fills: list[tuple[int, BlockName]],
) -> None:  # fmt: skip
    """Move a sequence from the queue to a slot; what its step shares with earlier ones of it is promised by now."""
    pool = scheduler.pool
    scheduler.leave_queue(s)
    for place, block in pool.adopted(s.names, hits).items():
        if place not in found:
            pool.hold(block)
            found[place] = block
    computed = hits * pool.block_size
    blocks = [[found.get((g, index), 0) for index in range(hits)] for g in range(len(pool.groups))]
    for group, adopted in zip(pool.groups, blocks, strict=True):
        needed = int(group.first_needed(computed)) // pool.block_size
        assert all(adopted[needed:]), "a block that was to be adopted is gone"
    scheduler.slots.enter(s, blocks, computed)
    s.num_promised = s.num_published = hits
    if s.num_cached is None:
        s.num_cached = computed
    if not s.charged:
        s.charged = True
        scheduler.counters[s.tenant] += scheduler.policy.cost(np.array([len(s.prompt)]), np.zeros(1))[0]
    missing = -(-(computed + count) // pool.block_size) - hits
    if missing > 0:
        scheduler.slots.extend(s, take_blocks(pool, missing))
    _promise(scheduler, s, computed + count, fills)


def _promise(scheduler: Scheduler, s: Sequence | None, end: int, fills: list[tuple[int, BlockName]]) -> None:
    """Name the blocks that a step fills, so that even its other sequences can share them.

    That is sound because every layer writes the whole step's keys and values before it attends to any.
    """
    assert s is not None
    pool = scheduler.pool
    full = min(end, s.num_known) // pool.block_size
    if pool.caching and s.publishes and full > s.num_promised:
        names = s.names_of_full_blocks(full * pool.block_size, pool.block_size)
        for block, name in _named(s, names, s.num_promised):
            pool.promise(block, name)
            fills.append((block, name))
        s.num_promised = max(s.num_promised, len(names))


def _named(s: Sequence, names: list[BlockName], start: int) -> Iterator[tuple[int, BlockName]]:
    """Yield the blocks of every group from an index on, and their names."""
    for index in range(start, len(names)):
        for g, blocks in enumerate(s.blocks):
            yield blocks[index], name_in(names[index], g)


def take_blocks(pool: BlockPool, count: int) -> list[list[int]]:
    """Take as many blocks for each group."""
    taken = pool.take(count * len(pool.groups))
    return [taken[g * count : (g + 1) * count] for g in range(len(pool.groups))]


def _forget_early(scheduler: Scheduler, rows: np.ndarray, before: np.ndarray) -> None:
    """Give back what nothing behind the committed tokens reads: neither steps under way, which begin there, nor later
    ones."""
    slots, pool = scheduler.slots, scheduler.pool
    for g, group in enumerate(pool.groups):
        if group.size:
            firsts = group.first_needed(before) // pool.block_size
            ends = group.first_needed(slots.computed[rows]) // pool.block_size
            for i in (ends > firsts).nonzero()[0].tolist():
                s = slots.sequences[rows[i]]
                assert s is not None
                pool.release(slots.drop(s, g, int(firsts[i]), int(ends[i])))


def complete(scheduler: Scheduler, step: Step, ended: Series[Sequence], given: np.ndarray | None = None) -> None:
    """Account for the earliest step under way: its sampled tokens are in the sequences' outputs by now.

    given  (R,) tokens that each sequence got: where it has guesses, those that stood and one more. Default: one each
    """
    given = step.yields.astype(np.int64) if given is None else given
    stood = np.minimum(np.maximum(given - 1, 0), step.drafts)
    fell = step.drafts - stood  # their keys and values are overwritten by the next step
    slots, pool = scheduler.slots, scheduler.pool
    assert scheduler.flying[0] is step
    for block, name in step.fills:
        if pool.names.get(block) == name:
            pool.publish(block, name)
    here = slots.epoch[step.slots] == step.epochs
    rows = step.slots[here]
    before = slots.computed[rows]
    slots.computed[rows] += (step.counts - fell)[here]
    slots.scheduled[rows] -= fell[here]
    slots.known[rows] += stood[here]
    slots.drafts[rows] = 0
    if pool.caching:
        for slot in rows[slots.computed[rows] // pool.block_size > slots.published[rows]].tolist():
            _publish(scheduler, slot)
    _forget_early(scheduler, rows, before)
    for i in (~here & step.yields).nonzero()[0].tolist():
        s = step.sequences[i]
        if s.place >= 0:  # preempted meanwhile
            scheduler.queue.set(s, "known", s.num_known)
    yielding = np.array([s.tenant for s, y in zip(step.sequences, step.yields.tolist(), strict=True) if y])
    if len(yielding):
        cost = scheduler.policy.cost(np.zeros(len(yielding)), np.maximum(given[step.yields], 1).astype(float))
        np.add.at(scheduler.counters, yielding, cost)
    for s in ended:
        scheduler.ended(s)
    scheduler.flying.pop(0)
    scheduler.remove(ended)
    pool.step_done(step.number)
    slots.step_done(step.number)


def _publish(scheduler: Scheduler, slot: int) -> None:
    slots, pool = scheduler.slots, scheduler.pool
    s = slots.sequences[slot]
    assert s is not None
    if not s.publishes:
        return
    full = int(slots.computed[slot]) // pool.block_size
    names = s.names_of_full_blocks(full * pool.block_size, pool.block_size)
    for block, name in _named(s, names, s.num_published):
        pool.publish(block, name)
    s.num_published = slots.published[slot] = max(s.num_published, len(names))
    s.num_promised = max(s.num_promised, s.num_published)


def undo(scheduler: Scheduler) -> None:
    """Let all that is under way start over: what failed steps wrote is not trusted, and was promised at most.

    A promised block's holders all compute in a step under way, so they let go of it, and it loses its name with that.
    """
    steps, scheduler.flying = scheduler.flying, []
    for step in steps:
        for s, epoch in zip(step.sequences, step.epochs.tolist(), strict=True):
            if s.slot >= 0 and scheduler.slots.epoch[s.slot] == epoch:
                requeue(scheduler, s, fence=None)
    for step in steps:
        scheduler.pool.step_done(step.number)
        scheduler.slots.step_done(step.number)


def release(scheduler: Scheduler, s: Sequence) -> None:
    """Take slot and blocks from a running sequence; what steps under way may touch waits for the last of them."""
    _leave(scheduler, s, _fence(scheduler, s))


def requeue(scheduler: Scheduler, s: Sequence, fence: int | None = -1) -> None:
    """Let a running sequence wait and start over."""
    _leave(scheduler, s, _fence(scheduler, s) if fence == -1 else fence)
    scheduler._wait(s)


def _leave(scheduler: Scheduler, s: Sequence, fence: int | None) -> None:
    scheduler.slots.leave(s, fence)
    scheduler.pool.release(s.let_go(), fence)


def _fence(scheduler: Scheduler, s: Sequence) -> int | None:
    flying = scheduler.slots.scheduled[s.slot] > scheduler.slots.computed[s.slot]
    return scheduler.flying[-1].number if flying else None
