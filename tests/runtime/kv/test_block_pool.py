"""The block pool as a state machine: holders, promises, fences and leases against a model of what each block holds."""

from __future__ import annotations

from collections import Counter
from itertools import takewhile

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from seamwise.runtime.kv.pool import NULL_BLOCK, BlockPool


def first_found(pool: BlockPool, names: list[bytes]) -> list[int]:
    """Return the blocks of the longest run of names from the first, promised ones included."""
    return [pool.by_name[name] for name in takewhile(pool.by_name.__contains__, names)]


BLOCKS = 9
NAMES = st.sampled_from([b"a", b"b", b"c", b"d", b"e"])


class PoolMachine(RuleBasedStateMachine):
    """Holders take, share, name and release blocks, steps end; a model keeps what each block must contain."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(num_blocks=BLOCKS, block_size=2)
        self.holders: list[list[int]] = []
        self.content: dict[int, bytes] = {}  # of every block that was filled since it was taken
        self.published: set[int] = set()
        self.fenced: dict[int, int] = {}
        self.copying: dict[int, bytes] = {}
        self.loading: list[str] = []
        self.step = 0

    def held(self) -> set[int]:
        return {b for blocks in [*self.holders, *self.pool.leases.values()] for b in blocks}

    @rule(count=st.integers(1, 4))
    def take(self, count: int) -> None:
        if count <= self.pool.num_available:
            taken = self.pool.take(count)
            assert NULL_BLOCK not in taken
            assert not self.held() & set(taken), "a held block is handed out again"
            assert not self.fenced.keys() & set(taken), "a block is handed out before the step that may touch it ends"
            self.given(taken)
            self.holders.append(taken)

    def given(self, taken: list[int]) -> None:
        assert not self.copying.keys() & set(taken), "a block is handed out while it is copied"
        for block in taken:
            self.content.pop(block, None)
            self.published.discard(block)

    @precondition(lambda self: self.pool.resting)
    @rule(count=st.integers(1, 3))
    def copy(self, count: int) -> None:
        """What is next to be evicted is copied; it is found by its name meanwhile."""
        for block in list(self.pool.resting)[:count]:
            self.pool.copy(block)
            self.copying[block] = self.content[block]

    @precondition(lambda self: self.copying)
    @rule(data=st.data())
    def copied(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from([*self.copying]))
        name = self.copying.pop(block)
        assert self.content.get(block) == name, "a copy holds what it did not when it began"
        self.pool.copied(block)

    @rule(names=st.lists(NAMES, max_size=2), count=st.integers(1, 2))
    def load(self, names: list[bytes], count: int) -> None:
        """Blocks are held for somebody who is no sequence, beside those of a prefix; then they are named."""
        kept = [b for n in dict.fromkeys(names) if (b := self.pool.by_name.get(n)) in self.published and b is not None]
        if count + sum(block in self.pool.resting for block in kept) > self.pool.num_available:
            return
        lease = f"load {self.step} {len(self.loading)}"
        taken = self.pool.take_leased(lease, kept, count)
        for block in kept:
            self.fenced.pop(block, None)
        self.given(taken)
        self.loading.append(lease)

    @precondition(lambda self: self.loading)
    @rule(name=NAMES)
    def loaded(self, name: bytes) -> None:
        lease = self.loading.pop()
        blocks = self.pool.leases[lease]
        if name not in self.pool.by_name:
            self.pool.publish(blocks[-1], name)
            self.content[blocks[-1]] = name
            self.published.add(blocks[-1])
        self.pool.end_lease(lease)
        for block in {*blocks} - self.held():
            self.settle(block)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), name=NAMES, publish=st.booleans())
    def name(self, data: st.DataObject, name: bytes, publish: bool) -> None:
        """A block is named once; its promise may be published later."""
        block = data.draw(st.sampled_from([b for blocks in self.holders for b in blocks] or [0]))
        if not block or self.content.setdefault(block, name) != name:
            return
        free = self.pool.by_name.get(name, block) == block
        (self.pool.publish if publish else self.pool.promise)(block, name)
        if not free:
            self.content.pop(block)  # an equal block has the name; this one stays without
            assert block not in self.pool.names
        elif publish:
            self.published.add(block)

    @rule(names=st.lists(NAMES, max_size=3))
    def share(self, names: list[bytes]) -> None:
        found = first_found(self.pool, names)
        assert [self.content[b] for b in found] == names[: len(found)]
        if len(found) < len(names):
            assert names[len(found)] not in self.pool.by_name
        if len(set(found)) == len(found):
            for block in found:
                self.pool.hold(block)
                self.fenced.pop(block, None)
            self.holders.append(found)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), under_way=st.booleans())
    def release(self, data: st.DataObject, under_way: bool) -> None:
        blocks = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.release(blocks, self.step + 1 if under_way else None)
        for block in {*blocks} - self.held():
            if under_way:
                self.fenced[block] = self.step + 1
            else:
                self.settle(block)

    def settle(self, block: int) -> None:
        if block not in self.published:
            self.content.pop(block, None)

    @rule()
    def step_done(self) -> None:
        self.step += 1
        self.pool.step_done(self.step)
        for block in [b for b, fence in self.fenced.items() if fence <= self.step]:
            del self.fenced[block]
            self.settle(block)

    @precondition(lambda self: self.pool.names)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        held = [b for blocks in self.holders for b in blocks if b in self.pool.names]
        if held:
            block = data.draw(st.sampled_from(held))
            if block not in self.copying:
                self.pool.forget(block)
                self.content.pop(block)
                self.published.discard(block)

    @rule(lease=st.sampled_from("xy"), name=NAMES)
    def lease(self, lease: str, name: bytes) -> None:
        found = first_found(self.pool, [name])
        if lease in self.pool.leases:
            blocks = self.pool.leases[lease]
            self.pool.end_lease(lease)
            for block in {*blocks} - self.held():
                self.settle(block)
        elif found and found[0] not in self.published:
            with pytest.raises(ValueError, match="not published"):
                self.pool.lease(lease, found)
        else:
            self.pool.lease(lease, found)
            self.fenced.pop(found[0], None) if found else None

    @invariant()
    def counts_conserve(self) -> None:
        self.pool.check()
        everyone = [*self.holders, *self.pool.leases.values()]
        assert Counter(b for blocks in everyone for b in blocks) == Counter(self.pool.holders)
        assert self.pool.fenced == self.fenced
        unheld = {*self.copying} - self.held() - self.fenced.keys()
        assert self.pool.num_available == BLOCKS - 1 - len(self.pool.holders) - len(self.fenced) - len(unheld)
        assert {b: n for b, n in self.pool.names.items() if b not in self.pool.promised} == {
            b: self.content[b] for b in self.published
        }

    def teardown(self) -> None:
        for blocks in [*self.holders, *self.pool.leases.values()]:
            self.pool.release(blocks)
        self.pool.step_done(self.step + 1)
        for block in self.copying:
            self.pool.copied(block)
        assert self.pool.num_available == BLOCKS - 1


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_the_least_recently_used_block_is_evicted_first_and_a_prefix_outlives_what_follows() -> None:
    pool = BlockPool(num_blocks=4, block_size=1)
    old, new = pool.take(2), pool.take(1)
    for block, name in zip(old + new, (b"a", b"ab", b"x"), strict=True):
        pool.publish(block, name)
    pool.release(old)
    pool.release(new)
    assert pool.take(2) == [old[1], old[0]]
    assert first_found(pool, [b"x"]) == new


def test_what_is_forgotten_is_found_no_more_and_its_blocks_are_free_or_held_without_a_name() -> None:
    pool = BlockPool(num_blocks=5, block_size=1)
    rests, held = pool.take(2), pool.take(1)
    for block, name in zip(rests + held, (b"a", b"ab", b"x"), strict=True):
        pool.publish(block, name)
    pool.release(rests)
    pool.forget_all()
    pool.check()
    assert first_found(pool, [b"a", b"ab"]) == first_found(pool, [b"x"]) == []
    assert pool.num_available == 3
    pool.release(held)
    assert pool.num_available == 4 and first_found(pool, [b"x"]) == []


def test_a_copied_block_is_the_next_to_be_evicted_unless_it_was_used_meanwhile() -> None:
    pool = BlockPool(num_blocks=5, block_size=1)
    blocks = pool.take(4)
    for block, name in zip(blocks, (b"a", b"b", b"c", b"d"), strict=True):
        pool.publish(block, name)
    pool.release(blocks[::-1])
    for block in blocks[:2]:
        pool.copy(block)
    assert pool.num_available == 2 and first_found(pool, [b"a", b"b"]) == blocks[:2]
    pool.hold(blocks[0])
    pool.release(blocks[:1])
    pool.check()
    assert pool.num_available == 2, "a block is handed out while it is copied"
    for block in blocks[:2]:
        pool.copied(block)
    assert pool.take(4) == [blocks[1], blocks[2], blocks[3], blocks[0]]


def test_a_promise_that_is_not_kept_is_never_found_again() -> None:
    pool = BlockPool(num_blocks=4, block_size=1)
    (block,) = pool.take(1)
    pool.promise(block, b"a")
    assert first_found(pool, [b"a"]) == [block]
    pool.release([block], fence=3)
    assert first_found(pool, [b"a"]) == [block], "the step that keeps the promise may still end well"
    pool.step_done(3)
    assert first_found(pool, [b"a"]) == []


def test_without_caching_nothing_is_named() -> None:
    pool = BlockPool(num_blocks=4, block_size=1, caching=False)
    pool.publish(pool.take(1)[0], b"a")
    assert not pool.names


def test_a_lease_is_taken_once_and_ends_once() -> None:
    pool = BlockPool(num_blocks=4, block_size=1)
    (block,) = pool.take(1)
    pool.publish(block, b"a")
    pool.lease("session", [block])
    pool.release([block])
    assert pool.num_available == 2
    with pytest.raises(ValueError, match="lease 'session' is in use"):
        pool.lease("session", [])
    pool.end_lease("session")
    assert pool.num_available == 3 and first_found(pool, [b"a"]) == [block]
    with pytest.raises(KeyError):
        pool.end_lease("session")


def test_a_pool_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks=1: wanted at least 2"):
        BlockPool(num_blocks=1, block_size=1)
