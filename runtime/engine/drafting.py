"""Guesses on their way into steps: who is guessed on, how far, and what became of it.

A grammar that leaves one token only is such a guess too, and a sure one: forced tokens are not computed one by one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from seamwise.runtime.sampling.rows import GuessableMask
from seamwise.runtime.scheduler.commit import Step
from seamwise.runtime.scheduler.scheduler import Scheduler
from seamwise.runtime.scheduler.sequence import Sequence
from seamwise.runtime.speculation.drafter import Drafter, Known
from seamwise.runtime.speculation.stats import DraftStats
from seamwise.runtime.speculation.watch import Watch

from .request import Completion, Request

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
    """

    drafter: Drafter | None = None
    most: int = 0
    vocab_size: int = 0
    watch: Watch = field(default_factory=Watch)
    stats: DraftStats = field(default_factory=DraftStats)
    _forced: set[int] = field(default_factory=set)  # slots of the next step whose guess is a grammar's
    _asked: bool = False  # whether the drafter was asked for the last step
    _seconds: float = 0.0  # that the last guesses took

    def __post_init__(self) -> None:
        self.stats.num_accepted_tokens_per_pos = [0] * self.most

    def wanted(self, scheduler: Scheduler, owners: Owners) -> bool:
        """Return whether what runs is guessed on: a step is then planned only when the one before has ended."""
        if self.drafter is not None and self.watch.wants(len(scheduler.running)):
            return True
        masks = (owners[s.arrival][1].options.mask_provider for s in scheduler.running)
        return any(mask is not None and isinstance(mask, GuessableMask) for mask in masks)

    def propose(self, scheduler: Scheduler, owners: Owners) -> None:
        """Write guesses behind the known tokens of those that decode; no step may be under way."""
        self._asked, self._seconds, self._forced = False, 0.0, set()
        scheduler.slots.drafts[:] = 0  # a guess for which the last step had no room is made anew
        if not self.wanted(scheduler, owners):
            return
        started = time.perf_counter()
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
        self._seconds = time.perf_counter() - started

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
        slots, asked = scheduler.slots, []
        for one in deciding:
            slot, mask = one.sequence.slot, one.completion.options.mask_provider
            wanted = (one.completion.options.params.extra_args or {}).get("num_speculative_tokens", self.most)
            most = min(wanted, self.most, one.room)
            if most > 0 and (mask is None or isinstance(mask, GuessableMask)):
                owner, tokens = (slot, int(slots.epoch[slot])), slots.tokens[slot, : slots.known[slot]]
                asked.append((one, Known(owner=owner, tokens=tokens, most=most)))
        if not asked:
            return {}
        found = {}
        for (one, known), guess in zip(asked, drafter.propose([known for _, known in asked]), strict=True):
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
    def _write(scheduler: Scheduler, guesses: Mapping[int, list[int]]) -> None:
        """Write guesses where the step reads tokens, as far as its budget and the blocks that nobody needs go."""
        slots, size = scheduler.slots, scheduler.pool.block_size
        active = slots.active()
        budget = scheduler.config.max_num_batched_tokens - len(active)
        spare = scheduler.pool.num_available - len(active)
        for slot, guess in guesses.items():
            known, held = int(slots.known[slot]), int(slots.held[slot])
            reach = max(held * size, min(known + len(guess), (held + max(spare, 0)) * size))
            count = max(min(len(guess), budget, reach - known), 0)
            spare -= max(-(-(known + count) // size) - held, 0)
            budget -= count
            slots.tokens[slot, known : known + count] = guess[:count]
            slots.drafts[slot] = count

    def note(self, step: Step, seconds: float, given: np.ndarray) -> None:
        """Count what became of a step's guesses; given: (R,) tokens that each sequence got."""
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
            return
        sequences = len(step.counts)
        self.watch.note(sequences, seconds + self._seconds, int(given.sum()) if self._asked else None)
        pays = self.watch.of(sequences).pays
        if pays != stats.active:
            stats.active = pays
            _LOG.info(
                "speculation is %s: at %d sequences a step with guesses %s", "on" if pays else "off", sequences,
                "pays" if pays else "takes longer than the tokens it gives are worth",
            )  # fmt: skip
