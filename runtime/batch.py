"""Turn a schedule into the step's ragged tensors, with numpy and no work proportional to a sequence's length."""

from __future__ import annotations

from collections.abc import Sequence as Series

import numpy as np
import torch

from .request import Sequence
from .step import StepInput


def ragged_step(
    token_ids: np.ndarray, table: np.ndarray, firsts: np.ndarray, counts: np.ndarray, block_size: int,
    logit_rows: np.ndarray | None = None,
) -> StepInput:  # fmt: skip
    """Return the step that computes counts[r] tokens of each request, after firsts[r] that are in its blocks table[r].

    token_ids are those of all requests concatenated. The logits wanted are of each request's last row by default.
    """
    starts = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=starts[1:])
    request = np.repeat(np.arange(len(counts)), counts)
    positions = np.arange(starts[-1], dtype=np.int64) + np.repeat(firsts - starts[:-1], counts)
    slots = table[request, positions // block_size] * np.int64(block_size) + positions % block_size
    rows = starts[1:] - 1 if logit_rows is None else logit_rows
    return StepInput(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(positions),
        slot_mapping=torch.from_numpy(slots),
        block_table=torch.from_numpy(table),
        seq_lens=torch.from_numpy((firsts + counts).astype(np.int32)),
        query_starts=torch.from_numpy(starts),
        logit_rows=torch.from_numpy(rows.astype(np.int64)),
    )


def build_batch(work: Series[tuple[Sequence, int]], block_size: int) -> tuple[StepInput, list[Sequence]]:
    """Return the step for (sequence, number of tokens) pairs, and the sequences whose next token it yields, in the
    order of the logits' rows: those for which the step computes the last known token."""
    firsts = np.array([s.num_computed for s, _ in work], dtype=np.int32)
    counts = np.array([count for _, count in work], dtype=np.int32)
    token_ids = np.empty(counts.sum(), dtype=np.int64)
    table = np.zeros((len(work), max(len(s.blocks) for s, _ in work)), dtype=np.int32)
    rows, yielding = [], []
    end = 0
    for r, (sequence, count) in enumerate(work):
        start, end = end, end + count
        last = sequence.num_computed + count
        num_blocks = len(sequence.blocks)
        table[r, :num_blocks] = sequence.table[:num_blocks]
        token_ids[start:end] = sequence.tokens[sequence.num_computed : last]
        if last == sequence.num_tokens:
            rows.append(end - 1)
            yielding.append(sequence)
    return ragged_step(token_ids, table, firsts, counts, block_size, np.array(rows, dtype=np.int64)), yielding
