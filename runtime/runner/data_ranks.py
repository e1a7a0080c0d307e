"""Ranks with requests of their own take every step together: they agree on its tokens, and each pads its own to them.

Where experts are shared out over ranks, a step's exchanges wait for all ranks, and every rank gives as many rows.
Padding stores nothing in a cache, and its logits are not given back. Where all ranks decode, it is requests of one
token, so that a recorded decode step serves it; else rows that no request owns.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from seamwise.runtime.build.runner_config import RunnerConfig
from seamwise.runtime.build.step import FIELDS, StepInput, step_of_padding


def agree(batch: StepInput, options: RunnerConfig) -> StepInput:
    """Return this rank's step as all ranks take it; of no tokens where no rank has any. Every rank must call it."""
    tokens, requests = batch.num_tokens, batch.num_requests
    mixed = tokens > 0 and not tokens == requests == batch.logit_rows.shape[0]
    most = torch.tensor([tokens, int(mixed)], device=options.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    most_tokens, any_mixed = most.tolist()
    if not most_tokens:
        return batch
    if not any_mixed:
        return _with_requests(batch, most_tokens - tokens)
    sizes = options.capture_sizes
    if "piecewise" in options.recorded_modes and most_tokens <= sizes[-1]:  # recorded on one rank and not on another
        most_tokens = sizes[bisect_left(sizes, most_tokens)]
    return _with_rows(batch if tokens else step_of_padding(), most_tokens)


def _with_requests(batch: StepInput, count: int) -> StepInput:
    """Add requests of one token that is their first; the null block holds what they would read."""
    if not count:
        return batch
    first = batch.num_tokens
    more = torch.arange(first, first + count)
    return replace(
        _with_rows(batch, first + count), adapter_slots=None, block_table=F.pad(batch.block_table, (0, 0, 0, count)),
        seq_lens=F.pad(batch.seq_lens, (0, count), value=1),
        query_starts=torch.cat((batch.query_starts, (more + 1).int())), logit_rows=torch.cat((batch.logit_rows, more)),
    )  # fmt: skip


def _with_rows(batch: StepInput, tokens: int) -> StepInput:
    padded: dict[str, Any] = {
        name: F.pad(getattr(batch, name), (0, tokens - batch.num_tokens), value=FIELDS[name].padding)
        for name in ("token_ids", "positions", "slot_mapping")
    }
    return replace(batch, **padded)
