"""Turn a schedule into the step's ragged tensors, with numpy and no work proportional to a sequence's length."""

from __future__ import annotations

from collections.abc import Sequence as Series

import numpy as np
import torch

from .request import Sequence
from .step import StepInput


def build_batch(work: Series[tuple[Sequence, int]], block_size: int) -> tuple[StepInput, list[Sequence]]:
    """Return the step for (sequence, number of tokens) pairs, and the sequences whose next token it yields, in the
    order of the logits' rows: those for which the step computes the last known token."""
    counts = np.array([count for _, count in work], dtype=np.int32)
    starts = np.zeros(len(work) + 1, dtype=np.int32)
    np.cumsum(counts, out=starts[1:])
    total = int(starts[-1])
    token_ids, positions, slots = (np.empty(total, dtype=np.int64) for _ in range(3))
    table = np.zeros((len(work), max(len(s.blocks) for s, _ in work)), dtype=np.int32)
    rows, yielding = [], []
    for r, (sequence, count) in enumerate(work):
        first, last = sequence.num_computed, sequence.num_computed + count
        here = slice(starts[r], starts[r + 1])
        table[r, : len(sequence.blocks)] = sequence.blocks
        token_ids[here] = sequence.tokens[first:last]
        position = np.arange(first, last)
        positions[here] = position
        slots[here] = table[r, position // block_size] * block_size + position % block_size
        if last == sequence.num_tokens:
            rows.append(int(starts[r + 1]) - 1)
            yielding.append(sequence)
    lengths = np.array([s.num_computed + count for s, count in work], dtype=np.int32)
    batch = StepInput(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(positions),
        slot_mapping=torch.from_numpy(slots),
        block_table=torch.from_numpy(table),
        seq_lens=torch.from_numpy(lengths),
        query_starts=torch.from_numpy(starts),
        logit_rows=torch.tensor(rows, dtype=torch.int64),
    )
    return batch, yielding
