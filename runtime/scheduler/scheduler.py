"""Decide how many tokens of each sequence the next step computes: {sequence id: number of tokens}.

There is no prefill and no decode: a sequence has tokens known and tokens computed, and a step computes some of the
difference within the token budget. Chunked prefill, continuous batching and prefix caching follow from that.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from seamwise.runtime.kv.pool import BlockPool

from .sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """max_num_batched_tokens: tokens a step computes at most; max_num_seqs: sequences that run at once."""

    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256

    def __post_init__(self) -> None:
        for name in ("max_num_batched_tokens", "max_num_seqs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: wanted at least 1")


@dataclass(slots=True, kw_only=True)
class Scheduler:
    """First come, first served. When the cache is full the latest arrival gives its blocks back and starts over."""

    config: SchedulerConfig
    pool: BlockPool
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)

    def check(self) -> None:
        """Assert the invariants that hold between steps."""
        self.pool.check()
        assert len(self.running) <= self.config.max_num_seqs
        assert all(not s.blocks and not s.num_computed for s in self.waiting)
        arrivals = [s.arrival for s in self.waiting]
        assert arrivals == sorted(arrivals), "the queue is out of order"
        held = Counter(block for s in self.running for block in s.blocks)
        assert held == Counter(self.pool.holders), "the pool and the sequences disagree on who holds what"
        for s in self.running:
            s.check()
            assert s.num_computed <= len(s.blocks) * self.pool.block_size

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises ValueError when it could not be computed even alone in the cache."""
        # The last token is returned, never computed.
        needed = -(-(sequence.num_prompt + sequence.max_tokens - 1) // self.pool.block_size)
        if needed > self.pool.num_blocks - 1:
            raise ValueError(
                f"request {sequence.id}: prompt of {sequence.num_prompt} and max_tokens={sequence.max_tokens} need"
                f" {needed} KV cache blocks of {self.pool.block_size} tokens, the cache has {self.pool.num_blocks - 1};"
                " lower max_tokens or give the cache more memory"
            )
        self.waiting.append(sequence)

    def schedule(self) -> dict[str, int]:
        """Choose the next step and reserve its blocks. Every scheduled sequence is in `running` afterwards."""
        budget = self.config.max_num_batched_tokens
        plan: dict[str, int] = {}
        self.running.sort(key=lambda s: s.arrival)
        position = 0
        while position < len(self.running) and budget:  # the list loses its latest arrivals on the way
            sequence = self.running[position]
            count = min(sequence.num_pending, budget)
            if self._make_room(sequence, count):
                self._start(sequence, count)
                plan[sequence.id] = count
                budget -= count
                position += 1
        while self.waiting and budget and len(self.running) < self.config.max_num_seqs:
            sequence = self.waiting[0]
            # A newcomer never takes blocks from a running one, and waits until a whole first chunk fits.
            if not self._adopt_prefix(sequence, budget):
                break
            count = min(sequence.num_pending, budget)
            self.running.append(self.waiting.popleft())
            self._start(sequence, count)
            plan[sequence.id] = count
            budget -= count
        assert plan or not (self.running or self.waiting), "nothing can be scheduled"
        return plan

    def restart(self, sequences: Iterable[Sequence]) -> None:
        """Queue running sequences again after a step that failed: what it wrote to the cache is not trusted."""
        for sequence in sequences:
            for block in sequence.blocks:
                self.pool.forget(block)
            self.running.remove(sequence)
            self._queue_again(sequence)

    def remove(self, sequences: Iterable[Sequence]) -> None:
        """Forget finished or aborted sequences and release their blocks."""
        gone = {id(s) for s in sequences}
        for sequence in self.running:
            if id(sequence) in gone:
                self.pool.release(sequence.let_go())
        self.running = [s for s in self.running if id(s) not in gone]
        if any(id(s) in gone for s in self.waiting):
            self.waiting = deque(s for s in self.waiting if id(s) not in gone)

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Preempt the latest arrivals until `count` more tokens fit; False when the sequence itself had to go."""
        while self._num_missing(sequence, count) > self.pool.num_available:
            victim = self.running.pop()
            victim.num_preemptions += 1
            self._queue_again(victim)
            if victim is sequence:
                return False
        return True

    def _adopt_prefix(self, sequence: Sequence, budget: int) -> bool:
        """Hold the cached blocks of a waiting sequence's start, if its first chunk after them fits in the pool.

        At least its last token is always computed, so at least that one is after them.
        """
        size = self.pool.block_size
        found = []
        if self.pool.caching:
            found = self.pool.longest_prefix(sequence.names_of_full_blocks(sequence.num_tokens - 1, size))
        cached = len(found) * size
        missing = -(-min(sequence.num_tokens, cached + budget) // size) - len(found)
        if missing > self.pool.num_available - sum(block in self.pool.resting for block in found):
            return False
        for block in found:
            self.pool.hold(block)
        sequence.hold(found)
        sequence.num_computed = sequence.num_cached = cached
        sequence.num_named = len(found)
        return True

    def _start(self, sequence: Sequence, count: int) -> None:
        """Take the blocks that a step needs, and name those it fills, so that even its other sequences can share them.

        That is sound because every layer writes the whole step's keys and values before it attends to any.
        """
        if missing := self._num_missing(sequence, count):
            sequence.hold(self.pool.take(missing))
        full = (sequence.num_computed + count) // self.pool.block_size
        if self.pool.caching and full > sequence.num_named:
            names = sequence.names_of_full_blocks(sequence.num_computed + count, self.pool.block_size)
            for i in range(sequence.num_named, full):
                self.pool.record(sequence.blocks[i], names[i])
            sequence.num_named = full

    def _num_missing(self, sequence: Sequence, count: int) -> int:
        return max(0, -(-(sequence.num_computed + count) // self.pool.block_size) - len(sequence.blocks))

    def _queue_again(self, sequence: Sequence) -> None:
        self.pool.release(sequence.let_go())
        insort(self.waiting, sequence, key=lambda s: s.arrival)
