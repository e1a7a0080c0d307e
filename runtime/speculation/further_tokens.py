"""Guess with the module that DeepSeek-V3 checkpoints have for it, over the hidden states of the model's own steps.

Each step of the model is asked for the hidden states of all its rows, which go into a cache with the model's own block
numbers, beside the module's latents; a prefix that is found has them too. The module's latents of a block depend on the
token after it, for each is made of a token and the next one: so blocks have names that say that token as well.
Before a guess the module computes what it lacks of a sequence: a block that it filled is filled for all that find it.
Further guesses take its own hidden states in place of the model's, as in vLLM; these latents are computed anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from seamwise.runtime.build.step import StepInput, StepOutput
from seamwise.runtime.runner.runner import ModelRunner
from seamwise.runtime.runner.shared_weights import further_layer

from .drafter import Known
from .model_drafter import ModelDrafter, Place


class FurtherTokens(ModelDrafter):
    """A ModelDrafter; `step` is the model's, and keeps the hidden states."""

    in_place = True
    stays_awake = True
    names_ahead = 1

    def __init__(self, whole: ModelRunner, guesses: int, budget: int) -> None:
        super().__init__(further_layer(whole, guesses), budget)
        self.whole = whole
        self._filled = np.zeros(0, dtype=bool)  # by block: the module's latents of all its positions are there
        self.bytes_per_block = self.runner.kv_spec.bytes_per_block
        self._computed: dict[int, tuple[tuple[int, int], int]] = {}  # by slot: whose, and how many positions

    def allocate(self, num_blocks: int) -> None:
        self.runner.allocate_kv(num_blocks)
        self._filled = np.zeros(num_blocks, dtype=bool)

    def watching(self, steps: object) -> FurtherTokens:
        """Return what computes the model's steps and keeps their hidden states."""
        assert steps is self.whole
        return self

    @torch.inference_mode()
    def step(self, batch: StepInput) -> StepOutput:
        """Compute a step of the model; keep the hidden states of its rows."""
        rows = torch.arange(batch.num_tokens)
        output = self.whole.step(replace(batch, logit_rows=rows, hidden_states=True))
        assert output.hidden_states is not None
        slots, _ = batch.groups[0]
        self._keep(output.hidden_states, slots)
        self._filled[slots.cpu().numpy() // self.runner.block_size] = False
        wanted = batch.logit_rows.to(output.logits.device)
        return replace(output, logits=output.logits[wanted], hidden_states=None)

    def text(self, one: Known) -> np.ndarray:
        return one.tokens[1:]

    def places(self, known: Sequence[Known]) -> list[Place]:
        found = []
        for index, one in enumerate(known):
            if (last := len(one.tokens) - 2) >= 0:  # a token and its successor are there
                owner, computed = self._computed.get(one.owner[0], (None, 0))
                if owner != one.owner:  # it has just begun
                    filled = self._filled[one.tables[0, : last // self.runner.block_size]]
                    computed = self.runner.block_size * int(filled.cumprod().sum())
                found.append(Place(index, one.tables[:1], min(computed, last)))
        return found

    def propose(self, known: Sequence[Known]) -> list[list[int]]:
        guesses = super().propose(known)
        for one in known:
            count = len(one.tokens) - 1
            self._computed[one.owner[0]] = one.owner, count
            self._filled[one.tables[0, : count // self.runner.block_size]] = True
        return guesses

    def carry(self, hidden_RD: Tensor, tables: np.ndarray, positions: np.ndarray) -> None:
        """Let the next guess be made on what was computed for this one."""
        size = self.runner.block_size
        blocks = tables[np.arange(len(positions)), 0, np.minimum(positions // size, tables.shape[2] - 1)]
        self._keep(hidden_RD, torch.from_numpy(blocks.astype(np.int64) * size + positions % size))

    def _keep(self, hidden: Tensor, slots: Tensor) -> None:
        cache, size = self.runner.kv_caches[0][1], self.runner.block_size
        slots = slots.to(cache.device)
        cache[slots // size, slots % size] = hidden.to(cache.dtype)
