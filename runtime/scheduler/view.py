"""What a plan is made from, and what it says. Both are plain values: nothing in them leads back to a sequence."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from seamwise.runtime.build.kv_groups import Groups
from seamwise.runtime.kv.names import BlockName


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Sequences as policies see them: columns of one length n, never written to.

    arrival   (n,) int64, unique: who came first; also a row's identity
    arrived   (n,) int64: the clock when it came
    priority  (n,) int64: lower is more urgent
    tenant    (n,) int64: index of whom it is charged to
    prompt    (n,) int64: tokens of its prompt
    known     (n,) int64: tokens known, output included
    cached    (n,) int64: of these, tokens that the cache is believed to hold; 0 for a sequence that runs
    predicted (n,) float64: expected tokens of output
    """

    arrival: np.ndarray
    arrived: np.ndarray
    priority: np.ndarray
    tenant: np.ndarray
    prompt: np.ndarray
    known: np.ndarray
    cached: np.ndarray
    predicted: np.ndarray

    def __len__(self) -> int:
        return len(self.arrival)

    def take(self, index: np.ndarray) -> Rows:
        return Rows(**{name: getattr(self, name)[index] for name in COLUMNS})


COLUMNS = tuple(f.name for f in fields(Rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far each running sequence is, beside its Rows; (n,) each.

    slot       where it runs
    pending    known tokens that are not scheduled
    scheduled  tokens handed to steps; computed: of committed ones; held: blocks that these have, in a table
    own        blocks that only it holds (0 where the cache is not tight: then nobody asks)
    max_chunk  tokens that one step may compute
    """

    slot: np.ndarray
    pending: np.ndarray
    scheduled: np.ndarray
    computed: np.ndarray
    held: np.ndarray
    own: np.ndarray
    max_chunk: np.ndarray

    @property
    def flying(self) -> np.ndarray:
        """Whether a step that has not been committed computes some of each."""
        return self.scheduled > self.computed


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A waiting sequence that may start in this step.

    names    of its full blocks before its last token, which is always computed
    hits     how many of them, from the first, the cache holds or an uncommitted step fills
    resting  of each group, how many of the blocks it adopts nobody holds: starting takes them from what is available
    """

    arrival: int
    known: int
    max_chunk: int
    names: tuple[BlockName, ...]
    hits: int
    resting: tuple[int, ...]


Shared = tuple[tuple[tuple[int, ...], int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Everything that a plan may depend on.

    clock      tokens scheduled since the beginning: time, for policies
    counters   (tenants,) float64: what each has been charged
    groups     what each group of layers reads of the past: each has a table of blocks
    available, coming  blocks that can be handed out now; blocks that uncommitted steps will set free
    shared     of blocks that several running sequences hold and nobody else: the rows of these in `running`, and how
               many blocks they are; free when all of these have given theirs back. Empty where the cache is not tight
    waiting    sequences that may be scheduled, blocked ones left out; empty when none can start
    candidates the first of them in the policy's order, as many as may start
    """

    step: int
    clock: int
    counters: np.ndarray
    block_size: int
    groups: Groups
    num_blocks: int
    available: int
    coming: int
    running: Rows
    progress: Progress
    shared: Shared
    waiting: Rows
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """A waiting sequence starts: it adopts `hits` blocks found by name and computes `count` tokens after them."""

    arrival: int
    hits: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One step, decided.

    grants       (slot, tokens) of sequences that run, first served first
    admissions   sequences that start, in order
    preemptions  slots of sequences that give their blocks back and wait again
    refusal      why the next candidate does not start: "blocks", "budget", "seats" or "preemption"; None if none waits
    """

    grants: tuple[tuple[int, int], ...]
    admissions: tuple[Admission, ...]
    preemptions: tuple[int, ...]
    refusal: str | None

    def __bool__(self) -> bool:
        return bool(self.grants or self.admissions)


def frozen(array: Any) -> np.ndarray:
    """Return an array, or a view of it, that cannot be written to."""
    view: np.ndarray = np.asarray(array).view()
    view.flags.writeable = False
    return view
