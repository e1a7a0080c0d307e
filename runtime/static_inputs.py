"""The step's input buffers: allocated once, so that what was recorded finds its inputs where they were."""

from __future__ import annotations

import torch
from torch import Tensor

from .step import StepInput


class StaticInputs:
    """Device buffers for the largest step; a step's tensors are views of their starts.

    The block table keeps its full width: rows of every step then have one stride.
    """

    def __init__(self, *, max_tokens: int, max_requests: int, max_blocks: int, device: str) -> None:
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.max_tokens, self.max_requests, self.max_blocks = max_tokens, max_requests, max_blocks
        self._token_ids = zeros(max_tokens, dtype=torch.int64)
        self._positions = zeros(max_tokens, dtype=torch.int64)
        self._slot_mapping = zeros(max_tokens, dtype=torch.int64)
        self._logit_rows = zeros(max_tokens, dtype=torch.int64)
        self._block_table = zeros(max_requests, max_blocks, dtype=torch.int32)
        self._seq_lens = zeros(max_requests, dtype=torch.int32)
        self._query_starts = zeros(max_requests + 1, dtype=torch.int32)

    def fits(self, batch: StepInput) -> bool:
        """Return whether a step has at most the tokens, requests and blocks the buffers were made for."""
        requests, blocks = batch.block_table.shape
        return (
            batch.token_ids.shape[0] <= self.max_tokens
            and batch.logit_rows.shape[0] <= self.max_tokens
            and requests <= self.max_requests
            and blocks <= self.max_blocks
        )

    def fill(self, batch: StepInput) -> StepInput:
        """Copy a step into the buffers and return it as views of them."""
        requests, blocks = batch.block_table.shape
        self._block_table[:requests, :blocks].copy_(batch.block_table)
        return StepInput(
            token_ids=_put(self._token_ids, batch.token_ids),
            positions=_put(self._positions, batch.positions),
            slot_mapping=_put(self._slot_mapping, batch.slot_mapping),
            block_table=self._block_table[:requests],
            seq_lens=_put(self._seq_lens, batch.seq_lens),
            query_starts=_put(self._query_starts, batch.query_starts),
            logit_rows=_put(self._logit_rows, batch.logit_rows),
        )


def _put(buffer: Tensor, values: Tensor) -> Tensor:
    view = buffer[: values.shape[0]]
    view.copy_(values, non_blocking=True)
    return view
