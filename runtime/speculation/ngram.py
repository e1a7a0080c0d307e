"""Guess what followed the last time that the sequence read as it does now (prompt lookup decoding).

Source: https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .drafter import Known


class NGram:
    """A Drafter. The last tokens, from `shortest` to `longest` of them, are looked for among the earlier ones.

    The longest match counts; of equal ones the latest that enough tokens follow, else the one that most follow.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self.shortest, self.longest = shortest, longest

    def propose(self, known: Sequence[Known]) -> list[list[int]]:
        """Return what followed the match; nothing where there is none."""
        return [self.continuation(one.tokens, one.most).tolist() for one in known]

    def continuation(self, tokens: np.ndarray, most: int) -> np.ndarray:
        """Return up to `most` tokens that followed the best match."""
        ends = self._ends_of_matches(tokens)
        if not len(ends):
            return tokens[:0]
        enough = ends[ends + most <= len(tokens)]
        start = enough[-1] if len(enough) else ends[0]
        return tokens[start : start + most]

    def _ends_of_matches(self, tokens: np.ndarray) -> np.ndarray:
        """Return where the longest matches end, in order; empty when they are shorter than `shortest`."""
        ends, matched = np.arange(1, len(tokens)), 0
        while matched < self.longest:
            longer = ends[ends > matched]
            longer = longer[tokens[longer - matched - 1] == tokens[len(tokens) - matched - 1]]
            if not len(longer):
                break
            ends, matched = longer, matched + 1
        return ends if matched >= self.shortest else ends[:0]
