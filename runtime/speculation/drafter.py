"""What guesses tokens: one small protocol, and where its implementations are found by name.

A guess is verified by the model itself: the step computes the guessed tokens with the last known one, each of its rows
samples the token after it exactly as a step of its own would (the same seed and position, so the same noise), and the
guesses before the first difference stand. Outputs are therefore those without speculation, greedy or sampled.

The acceptance rate is that of rejection sampling for a guess that is certain (Leviathan et al. 2023,
https://arxiv.org/abs/2211.17192): the guess x is the token drawn with probability p(x).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol

import numpy as np

from .config import SpeculativeConfig

ENTRY_POINTS = "seamwise.drafters"  # of other packages: a name, and a callable (config, runner) -> Drafter


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A sequence that may be guessed on.

    owner   (slot, epoch): the same for as long as it runs without a break
    tokens  (K,) int32: all of its tokens; most: how many may be guessed, at least 1
    """

    owner: tuple[int, int]
    tokens: np.ndarray
    most: int


class Drafter(Protocol):
    """Guesses; called between steps."""

    def propose(self, known: Sequence[Known]) -> list[list[int]]:
        """Return for each sequence the token ids that may follow, at most `most`, or none."""


def find_drafter(config: SpeculativeConfig, runner: Any) -> Drafter:
    """Return the drafter of a configuration. Raises ValueError for a method that nobody has."""
    from .ngram import NGram

    if config.method == "ngram":
        return NGram(config.prompt_lookup_min, config.prompt_lookup_max)
    found = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if config.method not in found:
        raise ValueError(
            f"speculative_config: method {config.method!r} is not known; wanted one of"
            f" {', '.join(sorted({'ngram', *found}))}"
        )
    make: Callable[[SpeculativeConfig, Any], Drafter] = found[config.method].load()
    return make(config, runner)
