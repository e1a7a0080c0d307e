"""Guess with the module that DeepSeek-V3 checkpoints have for it, over the hidden states of the model's own steps.

Each step of the model is asked for the hidden states of all its rows, which go into a cache with the model's own block
numbers; a prefix that is found has them too. Before a guess the module computes what it lacks of a sequence. Further
guesses take its own hidden states in place of the model's, as in vLLM; what it computed with those is computed anew.
Blocks that come back from a tier of the KV cache bring no hidden states along: guesses behind them are worse, no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from seamwise.model_defs.deepseek_mtp import ARCHITECTURE
from seamwise.runtime.build.step import StepInput, StepOutput
from seamwise.runtime.runner.runner import ModelRunner
from seamwise.runtime.runner.shared_weights import sharing

from .drafter import Known
from .model_drafter import ModelDrafter, Place


class FurtherTokens(ModelDrafter):
    """A ModelDrafter; `step` is the model's, and keeps the hidden states."""

    in_place = True
    stays_awake = True

    def __init__(self, whole: ModelRunner, guesses: int, budget: int) -> None:
        if whole.config.architecture != "DeepseekV3ForCausalLM" or not whole.config.raw.get("num_nextn_predict_layers"):
            raise ValueError(
                f"speculative_config: method 'mtp' needs a DeepSeek-V3 checkpoint with num_nextn_predict_layers=1, got"
                f" {whole.config.architecture} with {whole.config.raw.get('num_nextn_predict_layers')}"
            )
        raw = whole.config.raw | {"architectures": [ARCHITECTURE]}  # by which the pack is another than the model's
        config = replace(whole.config, architecture=ARCHITECTURE, num_layers=1, raw=raw)
        made = sharing(
            whole, config, whole.checkpoint, return_hidden_states=True, num_speculative_tokens=guesses,
            kv_cache_dtype=whole.options.dtype,
        )  # fmt: skip
        super().__init__(made, budget)
        self.whole = whole
        self.bytes_per_block = made.kv_spec.bytes_per_block
        self._computed: dict[int, tuple[tuple[int, int], int]] = {}  # by slot: whose, and how many positions

    def allocate(self, num_blocks: int) -> None:
        self.runner.allocate_kv(num_blocks)

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
        self._keep(output.hidden_states, batch.slot_mapping)
        wanted = batch.logit_rows.to(output.logits.device)
        return replace(output, logits=output.logits[wanted], hidden_states=None)

    def text(self, one: Known) -> np.ndarray:
        return one.tokens[1:]

    def places(self, known: Sequence[Known]) -> list[Place]:
        found = []
        for index, one in enumerate(known):
            slot, count = one.owner[0], len(one.tokens) - 1
            if count:
                owner, computed = self._computed.get(slot, (one.owner, 0))
                found.append(Place(index, one.tables[:1], min(computed, count - 1) if owner == one.owner else 0))
                self._computed[slot] = one.owner, count
        return found

    def carry(self, hidden_RD: Tensor, tables: np.ndarray, positions: np.ndarray) -> None:
        """Let the next guess be made on what was computed for this one."""
        size = self.runner.block_size
        blocks = tables[np.arange(len(positions)), 0, np.minimum(positions // size, tables.shape[2] - 1)]
        self._keep(hidden_RD, torch.from_numpy(blocks.astype(np.int64) * size + positions % size))

    def _keep(self, hidden: Tensor, slots: Tensor) -> None:
        cache, size = self.runner.kv_caches[0][1], self.runner.block_size
        slots = slots.to(cache.device)
        cache[slots // size, slots % size] = hidden.to(cache.dtype)
