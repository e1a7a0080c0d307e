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

from seamwise.kernels.comm import exchange
from seamwise.runtime.build.runner_config import RunnerConfig
from seamwise.runtime.build.step import FIELDS, StepInput, empty_step, step_of_padding


def agree(batch: StepInput, options: RunnerConfig) -> list[StepInput]:
    """Return this rank's step as all ranks take it, of no tokens where no rank has any; or the two that it is taken as.

    Two that take turns (enable_dbo) are taken where no rank votes against it. Every rank must call it.
    """
    exchange.forget()  # of a step that failed
    parts = halves(batch, options) if options.enable_dbo else None
    against = bool(batch.num_tokens) and parts is None
    first, second = parts or (batch, empty_step())
    mixed = any(p.num_tokens > 0 and not p.num_tokens == p.num_requests == len(p.logit_rows) for p in (first, second))
    own = [batch.num_tokens, int(mixed), int(against), first.num_tokens, second.num_tokens]
    most = torch.tensor(own, device=options.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    most_tokens, any_mixed, any_against, *each = most.tolist()
    if not most_tokens:
        return [batch]
    if options.enable_dbo and not any_against:
        return [_padded(p, n, bool(any_mixed)) for p, n in zip((first, second), each, strict=True)]
    sizes = options.capture_sizes
    if any_mixed and "piecewise" in options.recorded_modes and most_tokens <= sizes[-1]:
        most_tokens = sizes[bisect_left(sizes, most_tokens)]  # it may be recorded on one rank and not on another
    return [_padded(batch, most_tokens, bool(any_mixed))]


def _padded(batch: StepInput, tokens: int, mixed: bool) -> StepInput:
    if not mixed:
        return _with_requests(batch, tokens - batch.num_tokens)
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
    at = int(starts[cut])
    known = int((rows < at).sum())

    def part(tokens: slice, requests: slice, wanted: slice, first: int) -> StepInput:
        last = requests.stop if requests.stop is None else requests.stop + 1
        return replace(
            batch, adapter_slots=None, request_slots=None, request_generations=None,
            token_ids=batch.token_ids[tokens], positions=batch.positions[tokens],
            slot_mapping=batch.slot_mapping[tokens], block_table=batch.block_table[requests],
            seq_lens=batch.seq_lens[requests], query_starts=starts[requests.start : last] - first,
            logit_rows=rows[wanted] - first,
        )  # fmt: skip

    behind = part(slice(at, None), slice(cut, None), slice(known, None), at)
    return part(slice(0, at), slice(0, cut), slice(0, known), 0), behind


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
