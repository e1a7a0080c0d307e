"""Decide how many tokens of each sequence the next step computes: {sequence id: number of tokens}.

There is no prefill and no decode: a sequence has tokens known and tokens computed, and a step computes some of the
difference within the token budget. Chunked prefill, continuous batching and prefix caching follow from that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from .kv_blocks import ROOT, BlockPool, name_after
from .request import Sequence


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
        assert all(not s.blocks for s in self.waiting)
        for s in self.running:
            s.check()
            assert s.num_computed <= len(s.blocks) * self.pool.block_size

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises ValueError when it could not be computed even alone in the cache."""
        needed = -(-(sequence.num_prompt + sequence.max_tokens) // self.pool.block_size)
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
        for sequence in sorted(self.running, key=lambda s: s.arrival):
            if sequence not in self.running:  # preempted for an earlier one
                continue
            count = min(sequence.num_pending, budget)
            if count and self._reserve(sequence, count):
                self._record(sequence, count)
                plan[sequence.id] = count
                budget -= count
        while self.waiting and budget and len(self.running) < self.config.max_num_seqs:
            sequence = self.waiting[0]
            self._adopt_prefix(sequence)
            count = min(sequence.num_pending, budget)
            # A newcomer never takes blocks from a running one, and waits until a whole first chunk fits.
            if self._missing(sequence, count) > self.pool.num_available:
                self._give_back(sequence)
                break
            sequence.blocks += self.pool.take(self._missing(sequence, count))
            self.running.append(self.waiting.popleft())
            self._record(sequence, count)
            plan[sequence.id] = count
            budget -= count
        assert plan or not (self.running or self.waiting), "nothing can be scheduled"
        return plan

    def _record(self, sequence: Sequence, count: int) -> None:
        """Name the blocks that this step fills, so that even a sequence of the same step can share them.

        That is sound because every layer writes the whole step's keys and values before it attends to any.
        """
        size = self.pool.block_size
        while self.pool.caching and (sequence.num_named + 1) * size <= sequence.num_computed + count:
            start = sequence.num_named * size
            sequence.last_name = name_after(sequence.last_name, sequence.tokens[start : start + size].tolist())
            self.pool.record(sequence.blocks[sequence.num_named], sequence.last_name)
            sequence.num_named += 1

    def restart(self, sequences: Iterable[Sequence]) -> None:
        """Put sequences back in the queue after a step that failed: what it wrote to the cache is not trusted."""
        for sequence in sorted(sequences, key=lambda s: -s.arrival):
            for block in sequence.blocks:
                self.pool.forget(block)
            self._give_back(sequence)
            self.running.remove(sequence)
            self.waiting.appendleft(sequence)

    def remove(self, sequences: Iterable[Sequence]) -> None:
        """Forget finished or aborted sequences and release their blocks."""
        gone = {id(s) for s in sequences}
        for sequence in [s for s in self.running if id(s) in gone]:
            self._give_back(sequence)
        self.running = [s for s in self.running if id(s) not in gone]
        self.waiting = deque(s for s in self.waiting if id(s) not in gone)

    def _missing(self, sequence: Sequence, count: int) -> int:
        return max(0, -(-(sequence.num_computed + count) // self.pool.block_size) - len(sequence.blocks))

    def _reserve(self, sequence: Sequence, count: int) -> bool:
        """Get blocks for `count` more tokens, preempting later arrivals; False when the sequence itself had to go."""
        while (missing := self._missing(sequence, count)) > self.pool.num_available:
            victim = max(self.running, key=lambda s: s.arrival)
            self._give_back(victim)
            victim.num_preemptions += 1
            self.running.remove(victim)
            self.waiting.appendleft(victim)
            if victim is sequence:
                return False
        sequence.blocks += self.pool.take(missing)
        return True

    def _adopt_prefix(self, sequence: Sequence) -> None:
        """Hold the cached blocks of the sequence's start; at least its last token is always computed."""
        known = sequence.tokens[: sequence.num_tokens - 1].tolist()
        found = self.pool.longest_prefix(known)
        for block in found:
            self.pool.hold(block)
        sequence.blocks = found
        sequence.num_computed = sequence.num_cached = len(found) * self.pool.block_size
        sequence.num_named = len(found)
        sequence.last_name = self.pool.names[found[-1]] if found else ROOT

    def _give_back(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = sequence.num_named = 0
        sequence.last_name = ROOT
