"""`plan(view, limits, policy) -> Plan`: who computes how many tokens in the next step. A pure function.

There is no prefill and no decode: a sequence has tokens known and tokens scheduled, and a step takes some of the
difference within the token budget. Chunked prefill, continuous batching and prefix caching follow from that.
"""

from __future__ import annotations

import numpy as np

from seamwise.runtime.build.kv_groups import most_held

from .config import SchedulerConfig
from .policies import Policy
from .sequence import NO_LIMIT
from .view import Admission, Plan, Shared, View


def plan(view: View, limits: SchedulerConfig, policy: Policy) -> Plan:
    """Serve what runs, in the policy's order; when blocks are short the policy's victims give theirs back.

    What waits starts behind it, in the policy's order and none past another. A step that is short of blocks for those
    that run starts nobody.
    """
    order = _order(policy.serve(view, view.running), view.running.arrival)
    counts, preempted, available = _serve(view, limits, policy, order)
    order = order[counts[order] > 0]
    if available is not None:
        started, refusal = _admit(view, limits, counts, available)
    else:
        started, refusal = (), "preemption" if view.candidates else None
    return Plan(
        grants=tuple(zip(view.progress.slot[order].tolist(), counts[order].tolist(), strict=True)),
        admissions=started,
        preemptions=tuple(view.progress.slot[preempted].tolist()),
        refusal=refusal,
    )


def shortlist(view: View, policy: Policy, count: int) -> np.ndarray:
    """Return the first `count` rows of view.waiting in the policy's order."""
    rows = np.arange(len(view.waiting))
    sure: list[np.ndarray] = []
    keys = [*policy.admit(view, view.waiting), view.waiting.arrival]
    left = count
    for key in keys:  # cut by one key after the other, so that only ties of the last place are looked at again
        if len(rows) <= left:
            break
        values = key[rows]
        last = np.partition(values, left - 1)[left - 1]
        sure.append(rows[values < last])
        left -= len(sure[-1])
        rows = rows[values == last]
    chosen = np.concatenate([*sure, rows[:left]])
    return chosen[np.lexsort([key[chosen] for key in reversed(keys)])]


def _order(keys: tuple[np.ndarray, ...], arrival: np.ndarray) -> np.ndarray:
    """Return the rows in the order of keys, the most significant first, then of arrival."""
    return np.lexsort([arrival, *reversed(keys)])


def _serve(
    view: View, limits: SchedulerConfig, policy: Policy, order: np.ndarray
) -> tuple[np.ndarray, list[int], int | None]:
    """Return each running row's tokens, the rows that are preempted, and the blocks left; None: they were short."""
    run, size = view.progress, view.block_size
    wanted = np.minimum(run.pending, run.max_chunk)
    wanted = np.minimum(wanted, limits.long_prefill_token_threshold or NO_LIMIT)
    if (stages := limits.pipeline_parallel_size) > 1:
        wanted[run.flying & (run.pending <= 1)] = 0  # their last token is not known yet
        ready = order[wanted[order] > 0]
        wanted[ready[-(-len(order) // stages) :]] = 0
    available, coming = view.available, view.coming
    preempted: list[int] = []
    victims: list[int] | None = None
    while True:
        before = wanted[order].cumsum() - wanted[order]
        counts = np.zeros_like(wanted)
        counts[order] = np.clip(limits.max_num_batched_tokens - before, 0, wanted[order])
        missing = np.maximum(-(-(run.scheduled + counts) // size) - run.held, 0) * len(view.groups)
        missing[preempted] = 0
        needed = int(missing.sum())
        if needed <= available:
            return counts, preempted, None if preempted else available - needed
        if needed <= available + coming:  # blocks are on their way: who does not fit now waits a step
            counts[order[(missing[order].cumsum() > available) & (missing[order] > 0)]] = 0
            return counts, preempted, None
        if victims is None:
            victims = _order(policy.evict(view, view.running), view.running.arrival).tolist()
        victim = victims.pop()
        preempted.append(victim)
        wanted[victim] = 0
        freed: Shared = (((victim,), int(run.own[victim])),)
        freed += tuple(each for each in view.shared if victim in each[0] and set(each[0]) <= set(preempted))
        for rows, count in freed:
            if run.flying[list(rows)].any():
                coming += count
            else:
                available += count


def _admit(
    view: View, limits: SchedulerConfig, counts: np.ndarray, available: int
) -> tuple[tuple[Admission, ...], str | None]:
    """Return who starts, and why the next one does not."""
    run, size, running = view.progress, view.block_size, len(view.running)
    chunk = limits.longest_chunk
    budget = limits.max_num_batched_tokens - int(counts.sum())
    seats = limits.max_num_seqs - running
    if limits.scheduler_reserve_full_isl:  # what those that run have still to take for the tokens they know
        held = np.maximum(run.held, -(-(run.scheduled + counts) // size))
        total = run.scheduled + run.pending
        lacking, ahead = np.maximum(-(-total // size) - held, 0), np.minimum(total - run.computed, 2 * chunk)
        available -= sum(int(np.minimum(lacking, most_held(g, size, total, ahead)).sum()) for g in view.groups)
    spare = int(limits.watermark * view.num_blocks)
    started: list[Admission] = []
    promised: set[bytes] = set()
    for candidate in view.candidates:
        if not seats or not budget:
            return tuple(started), "budget" if seats else "seats"
        hits = candidate.hits
        while hits < len(candidate.names) and candidate.names[hits] in promised:
            hits += 1
        pending = candidate.known - hits * size
        count = min(pending, candidate.max_chunk, limits.long_prefill_token_threshold or NO_LIMIT, budget)
        reach = candidate.known if limits.scheduler_reserve_full_isl else hits * size + count
        new, ahead = -(-reach // size) - hits, min(reach - hits * size, 2 * chunk)
        needed = sum(
            min(int(most_held(g, size, reach, ahead)), new + resting)
            for g, resting in zip(view.groups, candidate.resting, strict=True)
        )
        if needed + (spare if running or started else 0) > available:
            return tuple(started), "blocks"
        started.append(Admission(arrival=candidate.arrival, hits=hits, count=count))
        promised.update(candidate.names[hits : (hits * size + count) // size])  # of earlier ones its windows need few
        available -= needed
        budget, seats = budget - count, seats - 1
    return tuple(started), None
