"""The scheduler's state: who waits, who runs in which slot, which steps are under way. commit.py carries out plans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np

from seamwise.runtime.build.kv_groups import blocks_of, most_tokens
from seamwise.runtime.kv.offload import REASON, Offload
from seamwise.runtime.kv.pool import BlockPool

from .commit import Step, commit, release, requeue
from .config import QueueFullError, SchedulerConfig
from .plan import plan
from .policies import Policy, find_policy
from .queue import Queue
from .sequence import Sequence
from .slots import Slots
from .view import Plan, View
from .viewing import take_view
from .waiting_for_tiers import begin_loads, count_hits, settle_loads

Recorder = Callable[[View, Plan], None]


class Scheduler:
    """Sequences in, steps out.

    longest   the most tokens that a sequence may have computed: as the caller says, and as the cache holds
    offload   tiers behind the cache, where there are any
    flying    steps that were planned and are not committed, the earliest first
    clock     tokens scheduled until now; counters: what each tenant was charged
    refusal   why the next waiting sequence does not start, as of the last plan
    stalled   the last plan changed nothing, and no step is under way that will: all that is here is blocked, or wants
              blocks that leases hold
    """

    def __init__(
        self, *, config: SchedulerConfig, pool: BlockPool, longest: int, policy: Policy | None = None,
        recorder: Recorder | None = None, offload: Offload | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.offload = offload
        self.pool = pool
        self.policy = policy or find_policy(config.scheduling_policy)
        self.recorder = recorder
        self.longest = most_tokens(pool.groups, pool.block_size, pool.num_blocks - 1, config.longest_chunk, longest)
        self.queue = Queue()
        self.slots = Slots(
            num_slots=2 * config.max_num_seqs, longest=longest, block_size=pool.block_size,
            num_groups=len(pool.groups),
        )  # fmt: skip
        self.waiting: dict[int, Sequence] = {}  # by arrival
        self.flying: list[Step] = []
        self.num_steps = 0
        self.clock = 0
        self.refusal: str | None = None
        self.stalled = False
        self.tenants: dict[str, int] = {}
        self.counters = np.zeros(8)
        self.waits_of = [0] * 8  # how many sequences of each tenant wait
        self._last_left = 0
        self._mean_output: float | None = None

    @property
    def running(self) -> list[Sequence]:
        return [s for s in self.slots.sequences if s is not None]

    def check(self) -> None:
        """Assert the invariants that hold between steps."""
        self.pool.check()
        self.queue.check()
        self.slots.check()
        assert len(self.running) <= self.config.max_num_seqs
        assert {s.arrival: s for s in self.queue.sequences} == self.waiting
        held = Counter(block for s in self.running for block in s.held_blocks)
        held.update(block for blocks in self.pool.leases.values() for block in blocks)
        assert held == Counter(self.pool.holders), "the pool and the sequences disagree on who holds what"
        for s in self.running:
            computed, size = int(self.slots.computed[s.slot]), self.pool.block_size
            for group, blocks in zip(self.pool.groups, s.blocks, strict=True):
                late = [b for b in blocks[computed // size :] if b in self.pool.names and b not in self.pool.promised]
                assert not late, "a block is published before it is computed"
                first = int(group.first_needed(computed)) // size
                assert not any(blocks[:first]) and all(blocks[first:]), "what is held is not what is needed"
                assert s.num_published <= s.num_promised <= len(blocks)
            flies = any(s is other for step in self.flying for other in step.sequences)
            assert flies or self.slots.scheduled[s.slot] == self.slots.computed[s.slot]
        counts = Counter(s.tenant for s in self.queue.sequences)
        assert counts == Counter(dict(enumerate(self.waits_of))), "tenants' waiting sequences are miscounted"
        filling = {block for step in self.flying for block, _ in step.fills}
        assert self.pool.promised <= filling, "a promise outlives its step"
        if not self.flying:
            assert not self.pool.fenced and not self.slots.fenced

    def tenant(self, name: str) -> int:
        """Return a tenant's index; its counter begins when it first comes."""
        index = self.tenants.setdefault(name, len(self.tenants))
        if index == len(self.counters):
            self.counters = np.append(self.counters, np.zeros(index))
            self.waits_of += [0] * index
        return index

    def predict(self, max_tokens: int) -> float:
        """Return the expected length of an output of which nothing is known but its limit."""
        return float(max_tokens) if self._mean_output is None else min(self._mean_output, max_tokens)

    def admissible(self, request_id: str, num_prompt: int, count: int) -> None:
        """Raise ValueError when a prompt can never be computed, QueueFullError when `count` more must not wait now."""
        pool, there = self.pool, self.pool.num_blocks - 1
        needed = blocks_of(pool.groups, pool.block_size, num_prompt, self.config.longest_chunk)
        if needed > there:
            raise ValueError(
                f"request {request_id}: a prompt of {num_prompt} tokens needs {needed} KV cache blocks of"
                f" {self.pool.block_size} tokens, the cache has {there}; shorten it or give the cache more memory"
            )
        limit, waiting = self.config.max_num_queued_reqs, len(self.queue)
        if limit is not None and waiting + count > limit:
            raise QueueFullError(
                f"request {request_id}: {waiting} sequences wait and it has {count}, max_num_queued_reqs={limit};"
                " try again later"
            )
        limit, tokens = self.config.max_num_queued_tokens, self.queue.num_tokens
        if limit is not None and tokens + count * num_prompt > limit:
            raise QueueFullError(
                f"request {request_id}: {tokens} prompt tokens wait and it has {count * num_prompt},"
                f" max_num_queued_tokens={limit}; try again later"
            )

    def add(self, s: Sequence) -> None:
        """Queue an admissible sequence.

        Its max_tokens may be more than fits now, as in vLLM: then others are preempted as it grows. What would not
        fit even alone in the cache is cut off: it ends there with finish_reason "length".
        """
        s.max_tokens = min(s.max_tokens, self.longest - len(s.prompt) + 1)
        s.arrived_clock = self.clock
        if not self.waits_of[s.tenant]:  # nothing is saved up while idle: see policies/ours.py
            there = [tenant for tenant, count in enumerate(self.waits_of) if count]
            lift = self.counters[there].min() if there else self.counters[self._last_left]
            self.counters[s.tenant] = max(self.counters[s.tenant], lift)
        self._wait(s)

    def _wait(self, s: Sequence) -> None:
        self.queue.add(s)
        self.waiting[s.arrival] = s
        self.waits_of[s.tenant] += 1

    def leave_queue(self, s: Sequence) -> None:
        """Take a sequence out of the queue, in a time that does not depend on the queue's length."""
        self.queue.remove(s)
        del self.waiting[s.arrival]
        self.waits_of[s.tenant] -= 1
        self._last_left = s.tenant

    def remove(self, sequences: Iterable[Sequence]) -> None:
        """Forget ended or aborted sequences; what they hold is free when no step under way can touch it."""
        for s in sequences:
            s.done = True
            if s.place >= 0:
                self.leave_queue(s)
            elif s.slot >= 0:
                release(self, s)

    def ended(self, s: Sequence) -> None:
        """Learn from the length of an output that ended by itself."""
        mean, length = self._mean_output, float(len(s.output))
        self._mean_output = length if mean is None else mean + 0.05 * (length - mean)

    def block(self, s: Sequence, reason: str | None) -> None:
        """Keep a sequence from being scheduled, for a named reason, or let it be again with None."""
        self.queue.block(s, reason)
        if s.slot >= 0:
            self.slots.max_chunk[s.slot] = s.max_chunk if reason is None else 0

    def reasons(self) -> dict[str, int]:
        """Return why sequences wait: each reason with how many there are of it."""
        named = Counter(s.blocked for s in self.queue.sequences if s.blocked is not None)
        if others := len(self.queue) - named.total():
            named[self.refusal or "next step"] += others
        return dict(named)

    def schedule(self) -> Step | None:
        """Plan the next step and commit the plan; None when nothing can be computed now."""
        if self.offload is not None:
            settle_loads(self)
            self.offload.store_ahead(self.pool)
        view = take_view(self)
        while self.offload is not None and begin_loads(self, view.candidates):
            view = take_view(self)
        decided = plan(view, self.config, self.policy)
        if self.offload is not None:
            count_hits(self, decided.admissions)
        if self.recorder is not None:
            self.recorder(view, decided)
        self.refusal = decided.refusal
        step = commit(self, decided)
        self.stalled = step is None and not self.flying and not decided.preemptions
        stuck = step is None and not self.flying and view.candidates and not self.running
        theirs = self.pool.leases or self.pool.leaving  # what is held by others than sequences
        assert not stuck or theirs, f"nothing runs, and nothing can start for want of {self.refusal}"
        return step

    def preempt(self, sequences: Iterable[Sequence]) -> None:
        """Queue running sequences again; they compute their known tokens anew."""
        for s in sequences:
            requeue(self, s)

    def rebuild(self, sequences: Iterable[Sequence]) -> None:
        """Begin anew with these sequences waiting, whatever was half done; no step may be under way.

        Their tokens are all that must survive an exception in the middle of a change. Leases keep their blocks.
        """
        old = self.pool
        for lease in () if self.offload is None else self.offload.forget(old):
            del old.leases[lease]
        self.pool = BlockPool(
            num_blocks=old.num_blocks, block_size=old.block_size, caching=old.caching, groups=old.groups
        )
        leased = {block for blocks in old.leases.values() for block in blocks}
        self.pool.free = [block for block in self.pool.free if block not in leased]
        self.pool.leases = old.leases
        for block in [b for blocks in old.leases.values() for b in blocks]:
            self.pool.holders[block] = self.pool.holders.get(block, 0) + 1
        for block in leased:
            self.pool.publish(block, old.names[block])
        self.queue, self.waiting, self.flying = Queue(), {}, []
        self.waits_of = [0] * len(self.waits_of)
        self.slots.clear()
        for s in sequences:
            s.slot = s.place = -1
            s.let_go()
            s.blocked = None if s.blocked == REASON else s.blocked
            self._wait(s)
