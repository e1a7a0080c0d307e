"""Turn a schedule into the step's ragged tensors, with numpy and no work proportional to a sequence's length."""

from __future__ import annotations

from collections.abc import Sequence as Series

import numpy as np

from seamwise.runtime.build.step import StepInput, ragged_step
from seamwise.runtime.scheduler.sequence import Sequence


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
