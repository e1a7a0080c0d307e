"""Switch speculation off where it is measured to be slower, and look again from time to time.

Steps of decoding alone are timed from end to end, as a reader of tokens sees them: the search, planning and text
between two steps count. They are kept by the number of sequences (in powers of two), where guessing was wanted and
where it was not; a search that finds nothing to guess is timed as well. Guessing is worth its time where  time with /
time without  is at most  the tokens that a step with it gave each sequence. Where it is not, SAMPLES steps in a row
guess now and then, so rarely that by these very times they cost no more than COST; where it is, as few do not.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from dataclasses import dataclass, field
from statistics import fmean, median

SAMPLES = 4  # the first of them is not timed: it begins where a step of the other kind ended
PERIOD = 128  # steps between samples, at least
COST = 0.02
_ENOUGH = SAMPLES - 1


def _latest() -> deque[float]:
    return deque(maxlen=5)  # a median of few: one slow step among them, which is recorded first, does not count


@dataclass(slots=True)
class Measured:
    """The latest steps of one size: seconds without guessing and with it, and tokens that a sequence got with it.

    sampling  whether the next `left` steps do what the others do not
    """

    without_s: deque[float] = field(default_factory=_latest)
    with_s: deque[float] = field(default_factory=_latest)
    tokens: deque[float] = field(default_factory=_latest)
    sampling: bool = True
    left: int = SAMPLES

    @property
    def gain(self) -> float | None:
        """Tokens a second with guessing, of those without; None: not yet known."""
        if min(len(self.without_s), len(self.with_s)) < _ENOUGH:
            return None
        return fmean(self.tokens) * median(self.without_s) / max(median(self.with_s), 1e-9)

    @property
    def pays(self) -> bool:
        """Whether guessing is faster, or not yet known not to be."""
        return self.gain is None or self.gain >= 1

    @property
    def period(self) -> int:
        """Steps from one sample to the next."""
        if self.pays:
            return PERIOD
        lost = median(self.with_s) / median(self.without_s) - fmean(self.tokens)  # steps that one of a sample costs
        return max(PERIOD, math.ceil(SAMPLES * lost / COST))

    def count(self) -> None:
        """Take note that a step was made."""
        self.left -= 1
        if self.left <= 0:
            self.sampling = not self.sampling
            self.left = SAMPLES if self.sampling else self.period


@dataclass(slots=True)
class Watch:
    """What is known of each size of step. _before: what the step before was and when it ended; None: something else."""

    measured: dict[int, Measured] = field(default_factory=lambda: defaultdict(Measured))
    _before: tuple[int, bool, float] | None = None

    def of(self, sequences: int) -> Measured:
        return self.measured[sequences.bit_length()]

    def wants(self, sequences: int) -> bool:
        """Return whether the next step of so many sequences shall guess."""
        found = self.of(sequences)
        return found.pays != found.sampling

    def note(self, sequences: int, ended_s: float, tokens: int | None) -> None:
        """Take a step of decoding alone into account that ended at a time, by one clock; the tokens it gave in all,
        None: no guess was wanted."""
        found, before = self.of(sequences), self._before
        self._before = (sequences, tokens is not None, ended_s)
        if before is not None and before[:2] == self._before[:2]:
            seconds = ended_s - before[2]
            if tokens is None:
                found.without_s.append(seconds)
            else:
                found.with_s.append(seconds)
                found.tokens.append(tokens / sequences)
        found.count()

    def interrupt(self) -> None:
        """Take note of a step that is not timed: the next one is not either."""
        self._before = None
