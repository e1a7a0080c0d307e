"""Which blocks of the KV cache are held, by how many, and which contents can be found by name.

      take            release, published            take (least recently used first)
free ──────► held ───────────────────────► resting ────────► held
  ▲            │ release, not published       ▲ hold(found by name)
  ├────────────┤                              │
  └── fenced ◄─┘ release while a step may still touch it; free or resting when that step is done

A resting block that is copied elsewhere is *leaving* meanwhile: still found by its name, handed out to nobody.

A held block's name is *promised* from when a step that fills it is planned until that step is committed: sequences of
the same step and of later ones may share it, nobody else sees it. Then it is *published*. A lease holds blocks for
somebody who is no sequence (a copy in flight, a session that may go on).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from seamwise.runtime.build.kv_groups import FULL, Groups

from .hits import longest_hit, name_in
from .names import BlockName

NULL_BLOCK = 0  # padding points here; it is never handed out


@dataclass(slots=True, kw_only=True)
class BlockPool:
    """All blocks of the cache; each but the null block is in exactly one of free, resting, leaving, fenced, holders.

    groups    of layers, which all take their blocks from here
    holders   block -> how many sequences and leases hold it
    fenced    block -> the step after which it is free or resting, in the order of these steps
    names     block -> name of its contents, promised or published; by_name is the inverse
    promised  blocks whose names are promised
    leases    lease -> its blocks
    copying   blocks whose contents are being read; leaving: those of them that nobody holds -> used since copying began
    kept      blocks that were copied since they were last used: once is enough, wherever the copy is by now
    """

    num_blocks: int
    block_size: int
    caching: bool = True
    groups: Groups = (FULL,)
    free: list[int] = field(init=False)
    resting: OrderedDict[int, None] = field(init=False, default_factory=OrderedDict)
    holders: dict[int, int] = field(init=False, default_factory=dict)
    fenced: dict[int, int] = field(init=False, default_factory=dict)
    names: dict[int, BlockName] = field(init=False, default_factory=dict)
    by_name: dict[BlockName, int] = field(init=False, default_factory=dict)
    promised: set[int] = field(init=False, default_factory=set)
    leases: dict[str, list[int]] = field(init=False, default_factory=dict)
    copying: set[int] = field(init=False, default_factory=set)
    leaving: dict[int, bool] = field(init=False, default_factory=dict)
    kept: set[int] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        if self.num_blocks < 2:
            raise ValueError(f"num_blocks={self.num_blocks}: wanted at least 2 (block 0 holds padding)")
        self.free = list(range(self.num_blocks - 1, NULL_BLOCK, -1))

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out now."""
        return len(self.free) + len(self.resting)

    def check(self) -> None:
        """Assert that every block is in exactly one state and that names are where they may be."""
        states = [*self.free, *self.resting, *self.leaving, *self.holders, *self.fenced]
        assert sorted(states) == list(range(1, self.num_blocks)), "a block is lost or in two states"
        assert all(count > 0 for count in self.holders.values())
        assert {b: n for n, b in self.by_name.items()} == self.names
        assert not set(self.free) & self.names.keys(), "a free block has a name"
        assert self.promised <= self.names.keys() and not self.promised & self.resting.keys()
        assert self.resting.keys() <= self.names.keys(), "a resting block cannot be found"
        assert self.leaving.keys() <= self.copying, "a block leaves and is not copied"
        assert self.kept <= self.names.keys()
        assert not self.copying & {*self.free, *self.resting, *self.promised}, "a block may be written while it is read"
        assert list(self.fenced.values()) == sorted(self.fenced.values())
        leased = Counter(b for blocks in self.leases.values() for b in blocks)
        assert all(count <= self.holders.get(b, 0) for b, count in leased.items()), "a leased block is not held"

    def take(self, count: int) -> list[int]:
        """Hand out `count` blocks with undefined contents. The caller has checked num_available."""
        assert count <= self.num_available, "more blocks asked for than are available"
        taken = []
        for _ in range(count):
            if self.free:
                block = self.free.pop()
            else:
                block, _ = self.resting.popitem(last=False)
                self._unname(block)
            self.holders[block] = 1
            taken.append(block)
        return taken

    def hold(self, block: int) -> None:
        """Let one more sequence hold a named block, wherever it is."""
        assert block in self.names, "a block without a name is shared"
        for state in (self.resting, self.leaving, self.fenced):
            state.pop(block, None)
        self.kept.discard(block)
        self.holders[block] = self.holders.get(block, 0) + 1

    def release(self, blocks: Sequence[int], fence: int | None = None) -> None:
        """Give back a sequence's blocks, its last first, so that a prefix outlives what follows it.

        fence  the last step that may still touch them; None when there is none
        """
        for block in reversed(blocks):
            self.holders[block] -= 1
            if self.holders[block]:
                continue
            del self.holders[block]
            if fence is None:
                self._settle(block)
            else:
                self.fenced[block] = fence

    def step_done(self, step: int) -> None:
        """Free what waited for a step, which is now committed with its names published, or has failed."""
        while self.fenced:
            block, fence = next(iter(self.fenced.items()))
            if fence > step:
                break
            del self.fenced[block]
            self._settle(block)

    def hit_length(self, names: Sequence[BlockName]) -> int:
        """Return how many blocks of the first group, promised ones included, an admission with these names adopts."""
        return longest_hit(self.groups, self.block_size, names, self.by_name)

    def adopted(self, names: Sequence[BlockName], hits: int, end: int = 0) -> dict[tuple[int, int], int]:
        """Return, by group and index, the blocks found of those that a request behind `hits` blocks holds.

        end  or behind any number of blocks up to this
        """
        found = {}
        for g, group in enumerate(self.groups):
            for index in range(int(group.first_needed(hits * self.block_size)) // self.block_size, max(hits, end)):
                block = self.by_name.get(name_in(names[index], g))
                if block is not None:
                    found[g, index] = block
        return found

    def promise(self, block: int, name: BlockName) -> None:
        """Name a held block that a planned step fills, unless it or an equal block is named already."""
        if self.caching and name not in self.by_name and block not in self.names:
            self.by_name[name] = block
            self.names[block] = name
            self.promised.add(block)

    def publish(self, block: int, name: BlockName) -> None:
        """Say that a block holds what the name says: the step that computed it is committed."""
        self.promise(block, name)
        if self.names.get(block) == name:
            self.promised.discard(block)

    def forget(self, block: int) -> None:
        """Take a held or fenced block's name away: its contents are not what the name says."""
        if block in self.names:
            self._unname(block)

    def forget_all(self) -> None:
        """Take all names away; what nobody holds is free."""
        self.names.clear()
        self.by_name.clear()
        self.promised.clear()
        self.kept.clear()
        self.free += self.resting
        self.resting.clear()

    def lease(self, lease: str, blocks: Sequence[int]) -> None:
        """Keep published blocks, held or resting, under a lease until it ends."""
        if lease in self.leases:
            raise ValueError(f"lease {lease!r} is in use; end it first")
        if bad := [b for b in blocks if b not in self.names or b in self.promised]:
            raise ValueError(f"lease {lease!r}: block {bad[0]} is not published, wanted blocks found by their names")
        for block in blocks:
            self.hold(block)
        self.leases[lease] = list(blocks)

    def take_leased(self, lease: str, kept: Sequence[int], count: int) -> list[int]:
        """Hold named blocks and hand out `count` more, all under a lease; return these. Their contents are undefined
        until they are published."""
        assert lease not in self.leases
        for block in kept:  # first: taking could evict them
            self.hold(block)
        self.leases[lease] = [*kept, *(taken := self.take(count))]
        return taken

    def copy(self, block: int) -> None:
        """Let a resting block's contents be read: it is handed out to nobody until copied()."""
        del self.resting[block]
        self.copying.add(block)
        self.leaving[block] = False

    def copied(self, block: int) -> None:
        """Say that a block's contents were read. What nobody used meanwhile is the next to be handed out."""
        self.copying.remove(block)
        if (used := self.leaving.pop(block, None)) is not None:
            self._settle(block)
            if not used and block in self.resting:
                self.resting.move_to_end(block, last=False)
                self.kept.add(block)

    def end_lease(self, lease: str) -> None:
        """Give a lease's blocks back. Raises KeyError for one that does not exist."""
        self.release(self.leases.pop(lease))

    def _settle(self, block: int) -> None:
        if block in self.promised:  # what was to fill it did not
            self._unname(block)
        if block in self.copying:
            self.leaving[block] = True
        elif block in self.names:
            self.resting[block] = None
        else:
            self.free.append(block)

    def _unname(self, block: int) -> None:
        del self.by_name[self.names.pop(block)]
        self.kept.discard(block)
        self.promised.discard(block)
