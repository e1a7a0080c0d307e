"""Sequences that wait, as columns: adding and removing one takes a time that does not depend on how many there are."""

from __future__ import annotations

import numpy as np

from .sequence import Sequence
from .view import COLUMNS, Rows, frozen

_DTYPES = {name: np.dtype(np.float64 if name == "predicted" else np.int64) for name in COLUMNS}


class Queue:
    """A dense table in no order (a policy gives one): the last row takes the place of a removed one."""

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.num_tokens = 0
        self.num_blocked = 0
        self._columns = {name: np.zeros(64, dtype) for name, dtype in _DTYPES.items()}

    def __len__(self) -> int:
        return len(self.sequences)

    def check(self) -> None:
        """Assert that the columns say what the sequences say."""
        assert [s.place for s in self.sequences] == list(range(len(self)))
        assert self.num_tokens == sum(len(s.prompt) for s in self.sequences)
        assert self.num_blocked == sum(s.blocked is not None for s in self.sequences)
        for sequence in self.sequences:
            assert sequence.slot < 0 and not sequence.blocks, "a waiting sequence holds blocks"
            assert self._columns["known"][sequence.place] == sequence.num_known
            assert self._columns["arrival"][sequence.place] == sequence.arrival

    def add(self, s: Sequence) -> None:
        place = len(self.sequences)
        if place == len(self._columns["arrival"]):
            self._columns = {name: np.resize(column, 2 * place) for name, column in self._columns.items()}
        s.place = place
        self.sequences.append(s)
        self.num_tokens += len(s.prompt)
        self.num_blocked += s.blocked is not None
        values = (s.arrival, s.arrived_clock, s.priority, s.tenant, len(s.prompt), s.num_known, 0, s.predicted)
        for column, value in zip(self._columns.values(), values, strict=True):
            column[place] = value

    def remove(self, s: Sequence) -> None:
        place, last = s.place, self.sequences.pop()
        if last is not s:
            self.sequences[place] = last
            last.place = place
            for column in self._columns.values():
                column[place] = column[len(self.sequences)]
        s.place = -1
        self.num_tokens -= len(s.prompt)
        self.num_blocked -= s.blocked is not None

    def set(self, s: Sequence, column: str, value: float) -> None:
        """Write one value of a waiting sequence's row."""
        self._columns[column][s.place] = value

    def block(self, s: Sequence, reason: str | None) -> None:
        """Say why a sequence cannot be scheduled, or that it can."""
        if s.place >= 0:
            self.num_blocked += (reason is not None) - (s.blocked is not None)
        s.blocked = reason

    def rows(self) -> tuple[Rows, np.ndarray | None]:
        """Return the rows that may be scheduled, and their places where those are not all."""
        count = len(self.sequences)
        rows = Rows(**{name: frozen(column[:count]) for name, column in self._columns.items()})
        if not self.num_blocked:
            return rows, None
        places = np.array([s.place for s in self.sequences if s.blocked is None], dtype=np.int64)
        return rows.take(places), places
