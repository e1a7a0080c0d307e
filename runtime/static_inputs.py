"""The step's input buffers: allocated once, so that what was recorded finds its inputs where they were."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .step import StepInput


class StaticInputs:
    """Device buffers for the largest step; a step's tensors are views of their starts.

    The block table keeps its full width: rows of every step then have one stride.
    """

    def __init__(self, *, max_tokens: int, max_requests: int, max_blocks: int, device: str) -> None:
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._token_ids = zeros(max_tokens, dtype=torch.int64)
        self._positions = zeros(max_tokens, dtype=torch.int64)
        self._slot_mapping = zeros(max_tokens, dtype=torch.int64)
        self._logit_rows = zeros(max_tokens, dtype=torch.int64)
        self._block_table = zeros(max_requests, max_blocks, dtype=torch.int32)
        self._seq_lens = zeros(max_requests, dtype=torch.int32)
        self._query_starts = zeros(max_requests + 1, dtype=torch.int32)

    def fill(self, batch: StepInput, tokens: int | None = None, rows: int | None = None) -> StepInput:
        """Copy a step into the buffers and return it as views of them.

        With `tokens` and `rows` it is padded to so many, and what only seams read moves to the device as it is. A row
        of padding belongs to no request, and its slot of -1 stores nothing.
        """
        device, (requests, blocks) = self._seq_lens.device, batch.block_table.shape
        if tokens is None:
            self._block_table[:requests, :blocks].copy_(batch.block_table)
            block_table, seq_lens = self._block_table[:requests], _put(self._seq_lens, batch.seq_lens)
            query_starts = _put(self._query_starts, batch.query_starts)
        else:
            spans = (batch.block_table, batch.seq_lens, batch.query_starts)
            block_table, seq_lens, query_starts = (x.to(device, non_blocking=True) for x in spans)
        return StepInput(
            token_ids=_put(self._token_ids, batch.token_ids, tokens),
            positions=_put(self._positions, batch.positions, tokens),
            slot_mapping=_put(self._slot_mapping, batch.slot_mapping, tokens, padding=-1),
            block_table=block_table,
            seq_lens=seq_lens,
            query_starts=query_starts,
            logit_rows=_put(self._logit_rows, batch.logit_rows, rows),
        )


def _put(buffer: Tensor, values: Tensor, size: int | None = None, padding: int = 0) -> Tensor:
    count = values.shape[0]
    view = buffer[: size or count]
    view.copy_(F.pad(values, (0, view.shape[0] - count), value=padding) if size else values, non_blocking=True)
    return view
