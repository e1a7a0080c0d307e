"""Ranks with requests of their own take every step together: they agree on its tokens, and each pads its own to them.

Where experts are shared out over ranks, a step's exchanges wait for all ranks, and every rank gives as many rows.
Padding stores nothing in a cache, and its logits are not given back. Where all ranks decode, it is requests of one
token, so that a recorded decode step serves it; else rows that no request owns.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from seamwise.kernels.comm import exchange
from seamwise.runtime.build.runner_config import RunnerConfig
from seamwise.runtime.build.step import FIELDS, StepInput, empty_step, step_of_padding


def agree(batch: StepInput, options: RunnerConfig) -> tuple[list[StepInput], list[int]]:
    """Return this rank's step as all ranks take it, of no tokens where no rank has any; or the two that it is taken as.

    Beside it: how many of the first rows of each one's logits are this rank's own. Two that take turns (enable_dbo) are
    taken where no rank votes against it. Every rank must call it.
    """
    exchange.forget()  # of a step that failed
    cut = halves(batch, options) if options.enable_dbo else None
    against = bool(batch.num_tokens) and cut is None
    parts: Sequence[StepInput] = cut or (batch, empty_step())
    mixed = any(p.num_tokens > 0 and not p.num_tokens == p.num_requests == len(p.logit_rows) for p in parts)
    own = [batch.num_tokens, int(mixed), int(against), *(p.num_tokens for p in parts)]
    most = torch.tensor(own, device=options.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    most_tokens, any_mixed, any_against, *sizes = most.tolist()
    if not options.enable_dbo or any_against or not most_tokens:
        parts, sizes = (batch,), [most_tokens]
    padded = [_padded(p, n, bool(any_mixed), options) for p, n in zip(parts, sizes, strict=True)]
    return padded, [len(p.logit_rows) for p in parts]


def _padded(batch: StepInput, tokens: int, mixed: bool, options: RunnerConfig) -> StepInput:
    if not mixed:
        return _with_requests(batch, tokens - batch.num_tokens)
    sizes = options.capture_sizes
    if "piecewise" in options.recorded_modes and tokens <= sizes[-1]:
        tokens = sizes[bisect_left(sizes, tokens)]  # it may be recorded on one rank and not on another
    return _with_rows(batch if batch.num_tokens else step_of_padding(), tokens)


def halves(batch: StepInput, options: RunnerConfig) -> tuple[StepInput, StepInput] | None:
    """Return a step as two of about as many tokens, whole requests in their order; None where it is not to be cut.

    A later request may share blocks that an earlier one writes in this step: its half is behind in every layer.
    """
    decode = batch.num_tokens == batch.num_requests
    least = options.dbo_decode_token_threshold if decode else options.dbo_prefill_token_threshold
    rows = batch.logit_rows
    if batch.num_requests < 2 or batch.num_tokens < least or bool((rows[1:] < rows[:-1]).any()):
        return None
    starts = batch.query_starts
    cut = int((starts[1:-1] - batch.num_tokens / 2).abs().argmin()) + 1

    def part(first: int, last: int) -> StepInput:
        start, end = starts[[first, last]].tolist()
        return replace(
            batch, adapter_slots=None, request_slots=None, request_generations=None,
            token_ids=batch.token_ids[start:end], positions=batch.positions[start:end],
            slot_mapping=batch.slot_mapping[start:end], block_table=batch.block_table[first:last],
            seq_lens=batch.seq_lens[first:last], query_starts=starts[first : last + 1] - start,
            logit_rows=rows[(rows >= start) & (rows < end)] - start,
        )  # fmt: skip

    return part(0, cut), part(cut, batch.num_requests)


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
