"""Sampling options where steps read them: arrays with a row for each slot, written when a sequence enters it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .params import SamplingParams


class MaskProvider(Protocol):
    """Says, before each token, which may come next; a grammar is one. Called where the step runs, in order."""

    def allowed_words(self, output_ids: list[int]) -> np.ndarray | None:
        """Return (⌈V/32⌉,) int32 words, bit t % 32 of word t // 32 set where token t may follow; None: all may."""


@runtime_checkable
class GuessableMask(MaskProvider, Protocol):
    """A mask that can be asked between steps about tokens to come."""

    def forced(self, output_ids: list[int]) -> list[int]:
        """Return the tokens that must come next, as far as they are certain."""

    def follows(self, output_ids: list[int], guess: list[int]) -> int:
        """Return how many tokens of a guess, from the first, may come next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOptions:
    """What one sequence asks of its logits beyond numbers; a step looks at it only where `special` is set.

    stop_ids   EOS ids that end it (none with ignore_eos): min_tokens forbids them too
    bad_words  token ids of each
    """

    params: SamplingParams
    seed: int
    num_prompt: int
    stop_ids: tuple[int, ...] = ()
    bad_words: Sequence[Sequence[int]] = ()
    mask_provider: MaskProvider | None = None

    @property
    def special(self) -> bool:
        """Whether its logits are edited before temperature."""
        p = self.params
        edits = p.has_penalties or p.logit_bias or p.min_tokens or p.allowed_token_ids or p.logits_processors
        return bool(edits or self.bad_words or self.mask_provider)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRows:
    """The L rows of one step, in the order of its logits.

    temperature, top_p, min_p  (L,) float32; top_k, seeds  (L,) int64; penalties (L, 3) float32
    positions  (L,) int64: tokens before the one to sample
    special    (L,) bool: options[r] is to be looked at before temperature; wants: for log probabilities
    history    (S, longest) int32 with a row for each slot; slots (L,) int64: the rows' own
    """

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    penalties: np.ndarray
    seeds: np.ndarray
    positions: np.ndarray
    special: np.ndarray
    wants: np.ndarray
    options: list[RowOptions]
    history: np.ndarray
    slots: np.ndarray

    def tokens(self, r: int) -> np.ndarray:
        """Return the tokens before the one to sample, (positions[r],) int32."""
        return self.history[self.slots[r], : self.positions[r]]

    def output_ids(self, r: int) -> list[int]:
        return self.tokens(r)[self.options[r].num_prompt :].tolist()


_NONE: Any = None


@dataclass(slots=True, kw_only=True)
class SamplingSlots:
    """(S,) arrays, one place for each slot; a row is written when a sequence enters the slot, and read by each step."""

    num_slots: int
    options: list[RowOptions] = field(init=False)
    numbers: np.ndarray = field(init=False)  # (S, 6) float32: temperature, top_p, min_p, three penalties
    whole: np.ndarray = field(init=False)  # (S, 2) int64: top_k, seed
    flags: np.ndarray = field(init=False)  # (S, 3) bool: special, wants log probabilities, wants those of its prompt

    def __post_init__(self) -> None:
        self.options = [_NONE] * self.num_slots
        self.numbers = np.zeros((self.num_slots, 6), dtype=np.float32)
        self.whole = np.zeros((self.num_slots, 2), dtype=np.int64)
        self.flags = np.zeros((self.num_slots, 3), dtype=bool)

    def enter(self, slot: int, options: RowOptions) -> None:
        """Write one sequence's row. A greedy row's token stays what it is: nothing is cut off there."""
        p, drawn = options.params, not options.params.greedy
        penalties = (p.repetition_penalty, p.frequency_penalty, p.presence_penalty)
        self.options[slot] = options
        self.numbers[slot] = (p.temperature if drawn else 0.0, p.top_p if drawn else 1.0, p.min_p * drawn, *penalties)
        self.whole[slot] = (p.top_k * drawn, _signed64(options.seed))
        self.flags[slot] = (options.special, p.wants_logprobs, p.prompt_logprobs is not None)

    def rows(self, slots: np.ndarray, positions: np.ndarray, history: np.ndarray) -> SamplingRows:
        """Return the rows of these slots, which sample the token after `positions` others."""
        numbers, whole, flags = self.numbers[slots], self.whole[slots], self.flags[slots]
        return SamplingRows(
            temperature=numbers[:, 0], top_p=numbers[:, 1], min_p=numbers[:, 2], penalties=numbers[:, 3:],
            top_k=whole[:, 0], seeds=whole[:, 1], special=flags[:, 0], wants=flags[:, 1], positions=positions,
            options=[self.options[slot] for slot in slots.tolist()], history=history, slots=slots,
        )  # fmt: skip


def _signed64(seed: int) -> int:
    """Return the int64 with the same low 64 bits."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
