"""Guesses on their way into steps: who is guessed on, how far, and what became of it.

A grammar that leaves one token only is such a guess too, and a sure one: forced tokens are not computed one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from seamwise.runtime.sampling.rows import GuessableMask
from seamwise.runtime.scheduler.commit import Step, take_blocks
from seamwise.runtime.scheduler.scheduler import Scheduler
from seamwise.runtime.scheduler.sequence import Sequence
from seamwise.runtime.speculation.drafter import Drafter, Known
from seamwise.runtime.speculation.stats import DraftStats
from seamwise.runtime.speculation.watch import Watch

from .request import Completion, Request
from .worker import Steps

_LOG = logging.getLogger(__name__)
_FORCED = 16  # tokens of a grammar that one step takes

Owners = Mapping[int, tuple[Request, Completion]]


class _Deciding(NamedTuple):
    """A sequence that decodes, and how many of its tokens may be guessed."""

    sequence: Sequence
    completion: Completion
    room: int


@dataclass(slots=True, kw_only=True)
class Drafting:
    """The state of speculation.

    drafter, most  what guesses, and how many tokens of a sequence at most; None: only grammars guess
    vocab_size     of the model, which the engine says: an id beyond it would be read past the embedding's end
    names_ahead    tokens behind a block of the KV cache on which depends what the drafter keeps under its number
    """

    drafter: Drafter | None = None
    most: int = 0
    vocab_size: int = 0
    names_ahead: int = field(init=False)
    watch: Watch = field(default_factory=Watch)
    stats: DraftStats = field(default_factory=DraftStats)
    _forced: set[int] = field(default_factory=set)  # slots of the next step whose guess is a grammar's
    _asked: bool = False  # whether the drafter was asked for the last step
    _told: bool = False  # whether it was said that guessing does not pay

    def __post_init__(self) -> None:
        self.stats.num_accepted_tokens_per_pos = [0] * self.most
        self.names_ahead = getattr(self.drafter, "names_ahead", 0)

    def watched(self, steps: Steps) -> Steps:
        """Return what computes steps, with the drafter looking on where it has to."""
        watching: Callable[[Steps], Steps] | None = getattr(self.drafter, "watching", None)
        return steps if watching is None else watching(steps)

    def wanted(self, scheduler: Scheduler, owners: Owners) -> bool:
        """Return whether what runs is guessed on: a step is then planned only when the one before has ended."""
        if self.drafter is not None and self.watch.wants(len(scheduler.running)):
            return True
        masks = (owners[s.arrival][1].options.mask_provider for s in scheduler.running if s.blocked is None)
        return any(mask is not None and isinstance(mask, GuessableMask) for mask in masks)

    def propose(self, scheduler: Scheduler, owners: Owners) -> None:
        """Write guesses behind the known tokens of those that decode; no step may be under way."""
        self._asked, self._forced = False, set()
        scheduler.slots.drafts[:] = 0  # a guess for which the last step had no room is made anew
        if not self.wanted(scheduler, owners):
            return
        slots = scheduler.slots
        deciding = list(self._deciding(scheduler, owners))
        guesses: dict[int, list[int]] = {}
        for s, completion, room in deciding:
            mask = completion.options.mask_provider
            if isinstance(mask, GuessableMask) and (forced := mask.forced(s.output)):
                guesses[s.slot] = forced[: min(room, _FORCED)]
        self._forced = {*guesses}
        self._asked = self.drafter is not None and self.watch.wants(len(slots.active()))
        if self.drafter is not None and self._asked:
            guesses |= self._drafts(
                self.drafter, scheduler, [one for one in deciding if one.sequence.slot not in guesses]
            )
        self._write(scheduler, guesses)

    def _deciding(self, scheduler: Scheduler, owners: Owners) -> Iterator[_Deciding]:
        slots = scheduler.slots
        for slot in slots.active().tolist():
            s = slots.sequences[slot]
            assert s is not None
            completion, room = owners[s.arrival][1], int(slots.limit[slot] - slots.known[slot])
            decodes = slots.known[slot] == slots.scheduled[slot] + 1 and slots.max_chunk[slot] > 0
            # Processors are asked about tokens that are so, in order, and not about guesses.
            if decodes and room > 0 and not completion.options.params.logits_processors:
                yield _Deciding(s, completion, room)

    def _drafts(self, drafter: Drafter, scheduler: Scheduler, deciding: list[_Deciding]) -> dict[int, list[int]]:
        slots, asked = scheduler.slots, dict[int, tuple[_Deciding, int]]()
        for one in deciding:
            slot, mask = one.sequence.slot, one.completion.options.mask_provider
            wanted = (one.completion.options.params.extra_args or {}).get("num_speculative_tokens", self.most)
            most = min(wanted, self.most, one.room)
            if most > 0 and (mask is None or isinstance(mask, GuessableMask)):
                asked[slot] = one, most
        if getattr(drafter, "in_place", False):
            asked = self._reserve(scheduler, asked)
        if not asked:
            return {}
        given = [
            Known(
                owner=(slot, int(slots.epoch[slot])), tokens=slots.tokens[slot, : slots.known[slot]], most=most,
                tables=slots.tables[:, slot],
            )
            for slot, (_, most) in asked.items()
        ]  # fmt: skip
        found = {}
        for (one, _), known, guess in zip(asked.values(), given, drafter.propose(given), strict=True):
            if bad := [token for token in guess if not 0 <= token < self.vocab_size]:
                raise RuntimeError(
                    f"{type(drafter).__name__} guessed token {bad[0]}, wanted 0 to {self.vocab_size - 1}"
                )
            mask = one.completion.options.mask_provider
            if isinstance(mask, GuessableMask):
                guess = guess[: mask.follows(one.sequence.output, guess)]
            if guess:
                found[one.sequence.slot] = guess[: known.most]
        return found

    @staticmethod
    def _fitting(scheduler: Scheduler, wanted: Mapping[int, int]) -> dict[int, int]:
        """Return how many guesses of each slot the step's budget and the blocks that nobody needs have room for."""
        slots, pool = scheduler.slots, scheduler.pool
        running, size = len(slots.active()), pool.block_size
        budget = scheduler.config.max_num_batched_tokens - running
        spare = max(pool.num_available // len(pool.groups) - running, 0)
        found = {}
        for slot, most in wanted.items():
            known, held = int(slots.known[slot]), int(slots.held[slot])
            count = max(min(most, budget, (held + spare) * size - known), 0)
            spare = max(spare - max(-(-(known + count) // size) - held, 0), 0)
            budget -= count
            found[slot] = count
        return found

    def _reserve(
        self, scheduler: Scheduler, asked: dict[int, tuple[_Deciding, int]]
    ) -> dict[int, tuple[_Deciding, int]]:
        """Let sequences hold the blocks of their guesses now; return those with room for any, and for how many."""
        slots, pool = scheduler.slots, scheduler.pool
        fitting = self._fitting(scheduler, {slot: most for slot, (_, most) in asked.items()})
        for slot, count in fitting.items():
            missing = -(-(int(slots.known[slot]) + count) // pool.block_size) - int(slots.held[slot])
            if count and missing > 0:
                slots.extend(asked[slot][0].sequence, take_blocks(pool, missing))
        return {slot: (asked[slot][0], count) for slot, count in fitting.items() if count}

    def _write(self, scheduler: Scheduler, guesses: Mapping[int, list[int]]) -> None:
        """Write guesses where the step reads tokens, as far as there is room."""
        slots = scheduler.slots
        for slot, count in self._fitting(scheduler, {slot: len(guess) for slot, guess in guesses.items()}).items():
            known = int(slots.known[slot])
            slots.tokens[slot, known : known + count] = guesses[slot][:count]
            slots.drafts[slot] = count

    def note(self, step: Step, ended_s: float, given: np.ndarray) -> None:
        """Count what became of a step's guesses, and watch what they cost.

        ended_s  when it ended; given: (R,) tokens that each sequence got
        """
        stats = self.stats
        for i in step.drafts.nonzero()[0].tolist():
            count, stood = int(step.drafts[i]), max(int(given[i]) - 1, 0)
            if int(step.slots[i]) in self._forced:
                stats.num_forced_tokens += stood
                continue
            stats.num_drafts += 1
            stats.num_draft_tokens += count
            stats.num_accepted_tokens += stood
            for position in range(stood):
                stats.num_accepted_tokens_per_pos[position] += 1
        if self.drafter is None or not (step.counts == 1 + step.drafts).all() or self._forced:
            self.watch.interrupt()
            return
        sequences = len(step.counts)
        self.watch.note(sequences, ended_s, int(given.sum()) if self._asked else None)
        measured = self.watch.of(sequences)
        stats.active, stats.gain = measured.pays, measured.gain or 1.0
        if not (stats.active or self._told):
            self._told = True
            _LOG.warning(
                "speculation is off where it does not pay: at %d sequences a step, tokens come %.2f times as fast with"
                " guesses as without; it is tried again every %d steps", sequences, stats.gain, measured.period,
            )  # fmt: skip
