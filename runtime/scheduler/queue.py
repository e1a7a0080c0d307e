"""Sequences that wait, as columns: adding and removing one takes a time that does not depend on how many there are."""

from __future__ import annotations

import numpy as np

from .sequence import Sequence
from .view import COLUMNS, Rows, frozen

_WHOLE = {name: i for i, name in enumerate(COLUMNS[:-1])}  # all columns but the last, predicted, which is real


class Queue:
    """A dense table in no order (a policy gives one): the last row takes the place of a removed one."""

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.num_tokens = 0
        self.num_blocked = 0
        self._whole = np.zeros((64, len(COLUMNS)), dtype=np.int64)  # whole rows are moved; the last column is float64
        self._predicted = self._whole.view(np.float64)[:, -1]

    def __len__(self) -> int:
        return len(self.sequences)

    def check(self) -> None:
        """Assert that the columns say what the sequences say."""
        assert [s.place for s in self.sequences] == list(range(len(self)))
        assert self.num_tokens == sum(len(s.prompt) for s in self.sequences)
        assert self.num_blocked == sum(s.blocked is not None for s in self.sequences)
        for sequence in self.sequences:
            assert sequence.slot < 0 and not sequence.blocks, "a waiting sequence holds blocks"
            assert [*self._whole[sequence.place, :-2].tolist(), self._predicted[sequence.place]] == _row(sequence)

    def add(self, s: Sequence) -> None:
        place = len(self.sequences)
        if place == len(self._predicted):
            self._whole = np.concatenate([self._whole, self._whole])
            self._predicted = self._whole.view(np.float64)[:, -1]
        s.place = place
        self.sequences.append(s)
        self.num_tokens += len(s.prompt)
        self.num_blocked += s.blocked is not None
        *whole, self._predicted[place] = _row(s)
        self._whole[place, :-1] = (*whole, 0)

    def remove(self, s: Sequence) -> None:
        place, last = s.place, self.sequences.pop()
        if last is not s:
            self.sequences[place] = last
            last.place = place
            self._whole[place] = self._whole[len(self.sequences)]
        s.place = -1
        self.num_tokens -= len(s.prompt)
        self.num_blocked -= s.blocked is not None

    def set(self, s: Sequence, column: str, value: int) -> None:
        """Write one whole number of a waiting sequence's row."""
        self._whole[s.place, _WHOLE[column]] = value

    def block(self, s: Sequence, reason: str | None) -> None:
        """Say why a sequence cannot be scheduled, or that it can."""
        if s.place >= 0:
            self.num_blocked += (reason is not None) - (s.blocked is not None)
        s.blocked = reason

    def rows(self) -> tuple[Rows, np.ndarray | None]:
        """Return the rows that may be scheduled, and their places where those are not all."""
        count = len(self.sequences)
        whole = {name: frozen(self._whole[:count, i]) for name, i in _WHOLE.items()}
        rows = Rows(**whole, predicted=frozen(self._predicted[:count]))
        if not self.num_blocked:
            return rows, None
        places = np.array([s.place for s in self.sequences if s.blocked is None], dtype=np.int64)
        return rows.take(places), places


def _row(s: Sequence) -> list[float]:
    """Return what a sequence says of its columns; `cached` is what the cache last was asked."""
    return [s.arrival, s.arrived_clock, s.priority, s.tenant, len(s.prompt), s.num_known, s.predicted]
