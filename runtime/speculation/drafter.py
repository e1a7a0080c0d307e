"""What guesses tokens: one small protocol, and where its implementations are found by name.

A guess is verified by the model itself: the step computes the guessed tokens with the last known one, each of its rows
samples the token after it exactly as a step of its own would (the same seed and position, so the same noise), and the
guesses before the first difference stand. Outputs are therefore those without speculation, greedy or sampled.

The acceptance rate is that of rejection sampling for a guess that is certain (Leviathan et al. 2023,
https://arxiv.org/abs/2211.17192): the guess x is the token drawn with probability p(x).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Protocol

import numpy as np

from seamwise.runtime.text.tokenizer import Tokenizer

from .config import SpeculativeConfig

ENTRY_POINTS = "seamwise.drafters"  # of other packages: a name, and a callable (config, runner) -> Drafter


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A sequence that may be guessed on.

    owner   (slot, epoch): the same for as long as it runs without a break
    tokens  (K,) int32: all of its tokens, of which all but the last are computed
    most    how many may be guessed, at least 1
    tables  (G, B) int32: its blocks in the model's KV cache, of each group
    """

    owner: tuple[int, int]
    tokens: np.ndarray
    most: int
    tables: np.ndarray = field(default_factory=lambda: np.zeros((1, 0), dtype=np.int32))


class Drafter(Protocol):
    """Guesses; called between steps. One with an attribute `in_place`, true, may write to what its `Known.tables` hold
    behind the computed tokens: there are blocks for the last known one and for every guess. One that keeps something of
    its own under the model's block numbers says by `names_ahead` on how many tokens behind a block that depends.
    """

    def propose(self, known: Sequence[Known]) -> list[list[int]]:
        """Return for each sequence the token ids that may follow, at most `most`, or none."""


def find_drafter(
    config: SpeculativeConfig, runner: Any, tokenizer: Tokenizer | None = None, max_num_batched_tokens: int = 2048
) -> Drafter:
    """Return the drafter of a configuration, for the model of a runner.

    max_num_batched_tokens  of a step, by which a drafter that is a model catches up with prompts
    Raises ValueError for a method that nobody has, or that the model or its options do not go with.
    """
    if config.method == "ngram":
        from .ngram import NGram

        assert config.prompt_lookup_min and config.prompt_lookup_max
        return NGram(config.prompt_lookup_min, config.prompt_lookup_max)
    if config.method in ("draft_model", "first_layers", "mtp"):
        from .find_model import find_model_drafter

        return find_model_drafter(config, runner, tokenizer, max_num_batched_tokens)
    found = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if config.method not in found:
        known = ", ".join(sorted({"ngram", "draft_model", "first_layers", "mtp", *found}))
        raise ValueError(f"speculative_config: method {config.method!r} is not known; wanted one of {known}")
    make: Callable[[SpeculativeConfig, Any], Drafter] = found[config.method].load()
    return make(config, runner)
