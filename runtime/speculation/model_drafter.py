"""Guess with a model: the likeliest token, by a small step for each place, of all sequences together.

A step of the drafter's own runner first computes what its cache lacks of each sequence, then one token a sequence for
each further guess. What is guessed depends on no other sequence's guesses, but for the arithmetic of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from seamwise.runtime.build.step import ragged_step
from seamwise.runtime.runner.runner import ModelRunner

from .drafter import Known


class Place(NamedTuple):
    """Where the keys of a text are: its blocks (G, B) of the drafter's cache, and how many of its tokens are there."""

    at: int
    table: np.ndarray
    computed: int


class ModelDrafter:
    """A Drafter over a runner; what it differs in says where keys are (`places`) and what is computed (`text`).

    budget           tokens of a step
    bytes_per_block  of a cache of its own; 0: it has none
    stays_awake      it cannot give its memory back
    """

    bytes_per_block = 0
    stays_awake = False

    def __init__(self, runner: ModelRunner, budget: int) -> None:
        self.runner, self.budget = runner, budget

    def allocate(self, num_blocks: int) -> None:
        """Take memory for as many KV blocks as the model's cache has, by now."""
        raise NotImplementedError

    def sleep(self) -> None:
        """Give memory back, as the model has done."""

    def wake(self, tags: Iterable[str] | None) -> None:
        """Take memory again, as the model has done."""

    def places(self, known: Sequence[Known]) -> list[Place]:
        """Return the places of those that can be guessed on; at least the last token of a text is not computed."""
        raise NotImplementedError

    def text(self, one: Known) -> np.ndarray:
        """Return the tokens that are computed before the first guess."""
        return one.tokens

    def most(self, one: Known) -> int:
        """Return how many guesses there may be."""
        return one.most

    @torch.inference_mode()
    def propose(self, known: Sequence[Known]) -> list[list[int]]:
        """Return the likeliest tokens, each on the ones before it; nothing for a sequence without a place."""
        guesses: list[list[int]] = [[] for _ in known]
        places = self.places(known)
        if not places:
            return guesses
        texts = [self.text(known[place.at]) for place in places]
        ends = np.array([len(text) for text in texts])
        most = np.array([self.most(known[place.at]) for place in places])
        tables = np.stack([place.table for place in places])
        ids = self._compute(texts, tables, np.array([place.computed for place in places]), ends)
        live = np.arange(len(places))
        for count in range(1, int(most.max()) + 1):
            for row, token in zip(live.tolist(), ids.tolist(), strict=True):
                guesses[places[row].at].append(token)
            goes_on = most[live] > count
            live, ids = live[goes_on], ids[goes_on]
            if not len(live):
                break
            ones = np.ones_like(live)
            ids = self._step(ids, tables[live], ends[live] + count - 1, ones, ones.astype(bool))
        return guesses

    def _compute(
        self, texts: Sequence[np.ndarray], tables: np.ndarray, firsts: np.ndarray, ends: np.ndarray
    ) -> np.ndarray:
        """Compute what lacks of each text, in steps within the budget; return (R,) the likeliest tokens after them."""
        longest = int((ends - firsts).max())
        if longest <= min(1 + self.runner.options.num_speculative_tokens, int(ends.min())):
            firsts = ends - longest  # the same of each, if more than lacks: such steps are recorded
        ids = np.zeros(len(texts), dtype=np.int64)
        while (pending := ends - firsts).any():
            counts = np.minimum(pending, np.maximum(self.budget - (pending.cumsum() - pending), 0))
            rows = counts.nonzero()[0]
            given = [texts[r][firsts[r] : firsts[r] + counts[r]] for r in rows.tolist()]
            ended = (firsts + counts == ends)[rows]
            ids[rows] = self._step(np.concatenate(given), tables[rows], firsts[rows], counts[rows], ended)
            firsts = firsts + counts
        return ids

    def _step(
        self, ids: np.ndarray, tables: np.ndarray, firsts: np.ndarray, counts: np.ndarray, ended: np.ndarray
    ) -> np.ndarray:
        """Compute counts[r] tokens of each row after its first firsts[r]; return (R,) the likeliest next ones.

        ended  (R,) bool: the row's text is computed, and what comes next is guessed
        """
        size = self.runner.block_size
        width = -(-int((firsts + counts).max()) // size)
        by_group = np.ascontiguousarray(tables[:, :, :width].swapaxes(0, 1))
        last = counts.cumsum() - 1
        every = len(set(counts.tolist())) == 1 and len(ids) <= len(counts) * (
            1 + self.runner.options.num_speculative_tokens
        )
        rows = np.arange(len(ids)) if every else last  # a step all of whose logits are wanted is recorded
        step = ragged_step(
            ids.astype(np.int64), by_group, firsts.astype(np.int32), counts.astype(np.int32), size, rows,
            hidden_states=self.runner.options.return_hidden_states,
        )  # fmt: skip
        output = self.runner.step(step)
        wanted = torch.from_numpy(last if every else np.arange(len(counts))).to(output.logits.device)
        if output.hidden_states is not None:
            rows = ended.nonzero()[0]
            self.carry(output.hidden_states[wanted[rows]], tables[rows], (firsts + counts)[rows])
        return output.logits[wanted].argmax(-1).cpu().numpy()

    def carry(self, hidden_RD: Tensor, tables: np.ndarray, positions: np.ndarray) -> None:
        """Take the hidden states of texts that end, on which guesses go on at these positions."""
