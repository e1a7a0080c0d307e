"""Where sequences run: one row of every array for each, at the same place from start to end, written in place.

A slot that is given back while a step may still write to it waits for that step, as its blocks do. So there are twice
as many slots as sequences that run at once, and memory that no sequence reaches is never touched.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .sequence import Sequence
from .view import Rows, frozen


@dataclass(slots=True, kw_only=True, eq=False)
class Slots:
    """(S,) arrays of counters and what policies read, known ≥ scheduled ≥ computed; tokens and block rows.

    tokens     (S, longest) int32: what steps read. A step writes the tokens it samples before the host knows them
    tables     (G, S, blocks) int32: the blocks that each holds, of each of G groups of layers
    known      tokens that a plan may count on: those of committed steps, and those that uncommitted ones will sample
    scheduled  tokens handed to steps; computed: of committed steps
    limit      tokens that are ever computed: the last one is sampled and never computed
    epoch      counts the owners that a slot has had
    drafts     guesses behind the known tokens: before a step is planned, and while it runs those that it computes
    """

    num_slots: int
    longest: int
    block_size: int
    num_groups: int = 1
    sequences: list[Sequence | None] = field(init=False)
    free: list[int] = field(init=False)
    fenced: list[tuple[int, int]] = field(init=False, default_factory=list)  # (step, slot)
    tokens: np.ndarray = field(init=False)
    tables: np.ndarray = field(init=False)
    counters: np.ndarray = field(init=False)  # (9, S): the rows are those that follow
    known: np.ndarray = field(init=False)
    scheduled: np.ndarray = field(init=False)
    computed: np.ndarray = field(init=False)
    limit: np.ndarray = field(init=False)
    held: np.ndarray = field(init=False)
    max_chunk: np.ndarray = field(init=False)
    published: np.ndarray = field(init=False)
    epoch: np.ndarray = field(init=False)
    drafts: np.ndarray = field(init=False)
    facts: np.ndarray = field(init=False)
    predicted: np.ndarray = field(init=False)
    occupied: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        count = self.num_slots
        self.tokens = np.empty((count, self.longest), dtype=np.int32)
        self.tables = np.zeros((self.num_groups, count, -(-self.longest // self.block_size)), dtype=np.int32)
        self.counters = np.zeros((9, count), dtype=np.int64)
        self.known, self.scheduled, self.computed, self.limit, self.held = self.counters[:5]
        self.max_chunk, self.published, self.epoch, self.drafts = self.counters[5:]
        self.facts = np.zeros((6, count), dtype=np.int64)
        self.predicted = np.zeros(count)
        self.clear()

    def clear(self) -> None:
        """Forget all sequences."""
        self.sequences = [None] * self.num_slots
        self.free = list(range(self.num_slots - 1, -1, -1))
        self.fenced = []
        self.occupied = np.zeros(self.num_slots, dtype=bool)

    def check(self) -> None:
        """Assert what holds between steps."""
        active = self.active()
        held = [*active.tolist(), *self.free, *(slot for _, slot in self.fenced)]
        assert sorted(held) == list(range(self.num_slots)), "a slot is lost or in two states"
        assert (self.known[active] + self.drafts[active] >= self.scheduled[active]).all(), (
            "more is scheduled than known"
        )
        assert (self.scheduled[active] >= self.computed[active]).all(), "more is computed than scheduled"
        assert (self.scheduled[active] <= self.held[active] * self.block_size).all(), "a token has no block"
        for slot in active.tolist():
            s = self.sequences[slot]
            assert s is not None and s.slot == slot and s.place < 0 and not s.done
            assert s.blocks == self.tables[:, slot, : self.held[slot]].tolist()
            assert s.num_known <= self.known[slot] <= s.num_known + 2
            assert self.tokens[slot, : s.num_known].tolist() == s.tokens.tolist()
            assert s.num_published * self.block_size <= self.computed[slot], "a name is published early"

    def active(self) -> np.ndarray:
        """Return the slots in which a sequence runs."""
        return self.occupied.nonzero()[0]

    def enter(self, s: Sequence, blocks: list[list[int]], computed: int) -> None:
        """Give a slot to a sequence whose first `computed` tokens are in these blocks."""
        slot = s.slot = self.free.pop()
        known = s.num_known
        self.tokens[slot, : len(s.prompt)] = s.prompt
        self.tokens[slot, len(s.prompt) : known] = s.output
        self.tables[:, slot] = 0
        s.blocks = [[] for _ in blocks]
        self.sequences[slot] = s
        self.epoch[slot] += 1
        limit = len(s.prompt) + s.max_tokens - 1
        self.counters[:7, slot] = (known, computed, computed, limit, 0, s.max_chunk, len(blocks[0]))
        self.drafts[slot] = 0
        self.facts[:, slot] = (s.arrival, s.arrived_clock, s.priority, s.tenant, len(s.prompt), 0)
        self.predicted[slot] = s.predicted
        self.extend(s, blocks)
        self.occupied[slot] = True

    def extend(self, s: Sequence, blocks: list[list[int]]) -> None:
        """Let a running sequence hold further blocks, as many of each group."""
        for g, (mine, more) in enumerate(zip(s.blocks, blocks, strict=True)):
            self.tables[g, s.slot, len(mine) : len(mine) + len(more)] = more
            mine += more
        self.held[s.slot] = len(s.blocks[0])

    def drop(self, s: Sequence, group: int, first: int, end: int) -> list[int]:
        """Return a running sequence's blocks first : end of a group: it has forgotten them."""
        dropped = [block for block in s.blocks[group][first:end] if block]
        s.blocks[group][first:end] = [0] * (end - first)
        self.tables[group, s.slot, first:end] = 0
        return dropped

    def leave(self, s: Sequence, fence: int | None) -> None:
        """Take a sequence's slot away; it is given out again after the step `fence`."""
        slot, s.slot = s.slot, -1
        self.sequences[slot] = None
        self.occupied[slot] = False
        self.epoch[slot] += 1
        if fence is None:
            self.free.append(slot)
        else:
            self.fenced.append((fence, slot))

    def step_done(self, step: int) -> None:
        """Give out again what waited for this step."""
        self.free += [slot for fence, slot in self.fenced if fence <= step]
        self.fenced = [(fence, slot) for fence, slot in self.fenced if fence > step]

    def rows(self, active: np.ndarray) -> Rows:
        """Return what policies see of these slots."""
        arrival, arrived, priority, tenant, prompt, cached = self.facts[:, active]
        columns = (arrival, arrived, priority, tenant, prompt, self.known[active], cached, self.predicted[active])
        return Rows(**dict(zip(Rows.__slots__, map(frozen, columns), strict=True)))
