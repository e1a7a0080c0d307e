"""Switch speculation off where it is measured to be slower, and look again from time to time.

Steps of decoding alone are timed, where guessing was wanted and where it was not, by the number of sequences in them
(in powers of two); a search that finds nothing to guess is timed as well. Guessing is worth its time where  time with /
time without  is at most  the tokens that a step with it gave each sequence. Where it is not, only SAMPLES of every
PERIOD steps guess; where it is, as few do not: so both times stay known.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from statistics import median

PERIOD, SAMPLES = 128, 3


def _latest() -> deque[float]:
    return deque(maxlen=5)  # a median of few: one slow step among them, which is recorded first, does not count


@dataclass(slots=True)
class Measured:
    """The latest steps of one size: seconds without guessing and with it, and tokens that a sequence got with it."""

    without_s: deque[float] = field(default_factory=_latest)
    with_s: deque[float] = field(default_factory=_latest)
    tokens: deque[float] = field(default_factory=_latest)
    steps: int = 0

    @property
    def pays(self) -> bool:
        """Whether guessing is faster, or not yet known not to be."""
        if min(len(self.without_s), len(self.with_s)) < SAMPLES:
            return True
        return median(self.with_s) <= median(self.without_s) * sum(self.tokens) / len(self.tokens)


@dataclass(slots=True)
class Watch:
    """What is known of each size of step."""

    measured: dict[int, Measured] = field(default_factory=lambda: defaultdict(Measured))

    def of(self, sequences: int) -> Measured:
        return self.measured[sequences.bit_length()]

    def wants(self, sequences: int) -> bool:
        """Return whether the next step of so many sequences shall guess."""
        found = self.of(sequences)
        sampling = found.steps % PERIOD < SAMPLES
        return found.pays != sampling

    def note(self, sequences: int, seconds: float, tokens: int | None) -> None:
        """Take a step of decoding alone into account; the tokens it gave in all, None: no guess was wanted."""
        found = self.of(sequences)
        found.steps += 1
        if tokens is None:
            found.without_s.append(seconds)
        else:
            found.with_s.append(seconds)
            found.tokens.append(tokens / sequences)
