"""The block pool and the scheduler as state machines."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from seamwise.runtime.kv.pool import NULL_BLOCK, BlockPool
from seamwise.runtime.sampling.params import SamplingParams
from seamwise.runtime.scheduler.scheduler import Scheduler, SchedulerConfig
from seamwise.runtime.scheduler.sequence import Sequence


class PoolMachine(RuleBasedStateMachine):
    """Holders take, share, name and release blocks; a model keeps what each block must contain."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(num_blocks=9, block_size=2)
        self.holders: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    @rule(count=st.integers(1, 4))
    def take(self, count: int) -> None:
        if count <= self.pool.num_available:
            taken = self.pool.take(count)
            assert NULL_BLOCK not in taken
            assert not {b for blocks in self.holders for b in blocks} & set(taken), "a held block is handed out again"
            for block in taken:
                self.content.pop(block, None)
            self.holders.append(taken)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), name=st.binary(min_size=1, max_size=1))
    def record(self, data: st.DataObject, name: bytes) -> None:
        """A block is named once, after it was filled."""
        block = data.draw(st.sampled_from([b for blocks in self.holders for b in blocks] or [0]))
        if block and block not in self.content:
            self.content[block] = name
            self.pool.record(block, name)

    @rule(names=st.lists(st.binary(min_size=1, max_size=1), max_size=3))
    def share(self, names: list[bytes]) -> None:
        found = self.pool.longest_prefix(names)
        assert [self.content[b] for b in found] == names[: len(found)]
        if len(found) < len(names):
            assert names[len(found)] not in self.pool.by_name
        if len(set(found)) == len(found):
            for block in found:
                self.pool.hold(block)
            self.holders.append(found)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @precondition(lambda self: self.pool.names)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        held = [b for blocks in self.holders for b in blocks if b in self.pool.names]
        if held:
            self.pool.forget(data.draw(st.sampled_from(held)))

    @invariant()
    def counts_conserve(self) -> None:
        self.pool.check()
        assert Counter(b for blocks in self.holders for b in blocks) == Counter(self.pool.holders)
        assert self.pool.num_available == 8 - len(self.pool.holders)

    def teardown(self) -> None:
        for blocks in self.holders:
            self.pool.release(blocks)
        assert self.pool.num_available == 8


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


class SchedulerMachine(RuleBasedStateMachine):
    """Sequences come, run, end and fail; two of them hold one block only when it holds the same tokens for both."""

    def __init__(self) -> None:
        super().__init__()
        pool = BlockPool(num_blocks=8, block_size=2)
        config = SchedulerConfig(max_num_batched_tokens=6, max_num_seqs=3)
        self.scheduler = Scheduler(config=config, pool=pool)
        self.sequences: list[Sequence] = []
        self.arrivals = 0

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=8), max_tokens=st.integers(1, 6))
    def add(self, prompt: list[int], max_tokens: int) -> None:
        self.arrivals += 1
        sequence = make_sequence(str(self.arrivals), prompt, max_tokens, arrival=self.arrivals)
        self.scheduler.add(sequence)
        self.sequences.append(sequence)

    @rule(token=st.integers(0, 1))
    def step(self, token: int) -> None:
        twin = copy.deepcopy(self.scheduler)
        plan = self.scheduler.schedule()
        assert twin.schedule() == plan, "the schedule is not a function of the state"
        assert bool(plan) == bool(self.sequences)
        assert sum(plan.values()) <= 6
        by_id = {s.id: s for s in self.sequences}
        if self.sequences:
            assert min(self.sequences, key=lambda s: s.arrival).id in plan, "the first to come waits"
        ended = []
        for sequence_id, count in plan.items():
            sequence = by_id[sequence_id]
            assert 0 < count <= sequence.num_pending
            assert len(sequence.blocks) * 2 >= sequence.num_computed + count
            sequence.num_computed += count
            if not sequence.num_pending:
                sequence.append(token)
                if sequence.num_tokens - sequence.num_prompt == sequence.max_tokens:
                    ended.append(sequence)
        self.scheduler.remove(ended)
        self.sequences = [s for s in self.sequences if s not in ended]

    @rule()
    def fail(self) -> None:
        plan = self.scheduler.schedule()
        self.scheduler.restart([s for s in self.sequences if s.id in plan])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.scheduler.remove([self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))])

    @invariant()
    def blocks_hold_one_history_each(self) -> None:
        self.scheduler.check()
        histories: dict[int, list[int]] = {}
        writers: dict[int, int] = {}
        for s in self.scheduler.running:
            for i, block in enumerate(s.blocks):
                history = s.tokens[: min((i + 1) * 2, s.num_computed)].tolist()
                assert histories.setdefault(block, history) == history, "a block is shared by different histories"
                writers[block] = writers.get(block, 0) + (len(history) < (i + 1) * 2)
        assert all(count <= 1 for count in writers.values()), "two sequences write to one block"

    def teardown(self) -> None:
        self.scheduler.remove(self.sequences)
        self.scheduler.check()
        assert self.scheduler.pool.num_available == 7


def make_sequence(name: str, prompt: list[int], max_tokens: int, arrival: int) -> Sequence:
    tokens = np.array(prompt + [0] * max_tokens, dtype=np.int64)
    return Sequence(
        id=name, tokens=tokens, num_tokens=len(prompt), num_prompt=len(prompt), params=SamplingParams(),
        max_tokens=max_tokens, arrival=arrival,
    )  # fmt: skip


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_the_least_recently_used_block_is_evicted_first_and_a_prefix_outlives_what_follows() -> None:
    pool = BlockPool(num_blocks=4, block_size=1)
    old, new = pool.take(2), pool.take(1)
    for block, name in zip(old + new, (b"a", b"ab", b"x"), strict=True):
        pool.record(block, name)
    pool.release(old)
    pool.release(new)
    assert pool.take(2) == [old[1], old[0]]
    assert pool.longest_prefix([b"x"]) == new


def test_without_caching_nothing_is_named() -> None:
    pool = BlockPool(num_blocks=4, block_size=1, caching=False)
    pool.record(pool.take(1)[0], b"a")
    assert not pool.names


@pytest.mark.parametrize("name", ["max_num_batched_tokens", "max_num_seqs"])
def test_limits_of_nothing_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0: wanted at least 1"):
        SchedulerConfig(**{name: 0})
    with pytest.raises(ValueError, match="num_blocks=1: wanted at least 2"):
        BlockPool(num_blocks=1, block_size=1)
