"""What ranks agree on: as many rows and parts on each, its own requests as they were, and padding that is no one's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from seamwise.compile.pipeline import PipelineConfig
from seamwise.passes import Parallel
from seamwise.runtime.build.model_config import ModelConfig
from seamwise.runtime.build.runner_config import RunnerConfig
from seamwise.runtime.build.step import StepInput, empty_step, ragged_step
from seamwise.runtime.runner.data_ranks import agree

REDUCE = {dist.ReduceOp.MAX: torch.amax, dist.ReduceOp.MIN: torch.amin, dist.ReduceOp.SUM: torch.sum}
Agreed = tuple[list[StepInput], list[int]]


def agreed(batches: list[StepInput], options: RunnerConfig) -> list[Agreed]:
    """Return what each rank's `agree` returns: called once for what it says, and again with what all have said."""
    said: list[Tensor] = []
    with patch.object(dist, "all_reduce", lambda own, op: said.append(own.clone())):
        for batch in batches:
            agree(batch, options)
    with patch.object(dist, "all_reduce", lambda own, op: own.copy_(REDUCE[op](torch.stack(said), 0))):
        return [agree(batch, options) for batch in batches]


def batch_of(rank: int, requests: list[tuple[int, int, str]], behind: bool) -> StepInput:
    """Return a step of requests: tokens known before, tokens, which logits. No two of its tokens are alike.

    behind  rows of logits that are not a request's last stand behind those that are, as a prompt's
    """
    if not requests:
        return empty_step()
    counts, ends = np.array([n for _, n, _ in requests]), np.cumsum([n for _, n, _ in requests])
    last = [int(end) - 1 for end, (_, _, wanted) in zip(ends, requests, strict=True) if wanted != "none"]
    spans = zip(ends, requests, strict=True)
    others = [row for end, (_, n, wanted) in spans if wanted == "all" for row in range(end - n, end - 1)]
    rows = [*last, *others] if behind else sorted(last + others)
    blocks = 1 + np.arange(len(requests) * 3, dtype=np.int32).reshape(-1, 3)
    ids = 100 * rank + np.arange(ends[-1])
    return ragged_step(ids, blocks, np.array([known for known, _, _ in requests]), counts, 4, np.array(rows, dtype=int))


def requests_of(part: StepInput, own: bool) -> list[tuple[list[int], int, list[int]]]:
    """Return the tokens, the length and the blocks of a step's requests: of those with slots of a cache, or others."""
    spans = zip(part.query_starts[:-1].tolist(), part.query_starts[1:].tolist(), strict=True)
    return [
        (part.token_ids[start:end].tolist(), length, table)
        for (start, end), length, table in zip(spans, part.seq_lens.tolist(), part.block_table.tolist(), strict=True)
        if own == (start < end and int(part.slot_mapping[start]) >= 0)
    ]


KINDS = st.sampled_from(["last", "last", "all", "none"])
DECODE = st.lists(st.tuples(st.integers(0, 6), st.just(1), st.just("last")), max_size=4)
CHUNKS = st.lists(st.tuples(st.integers(0, 6), st.just(1), st.sampled_from(["last", "none"])), min_size=3, max_size=4)
MIXED = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5), KINDS), max_size=4)
RANK = st.tuples(st.one_of(DECODE, DECODE, CHUNKS, MIXED), st.booleans())


@given(
    ranks=st.lists(RANK, min_size=2, max_size=3), two=st.booleans(),
    mode=st.sampled_from(["none", "full_and_piecewise"]), decode=st.integers(1, 5), prefill=st.integers(1, 9),
)  # fmt: skip
def test_ranks_take_one_step(
    tiny_llama_dir: Path, ranks: list[tuple[list[tuple[int, int, str]], bool]], two: bool, mode: str, decode: int,
    prefill: int,
) -> None:  # fmt: skip
    parallel = Parallel(size=len(ranks), rank=0, group="", experts=True, data=True, two_batches=two)
    options = RunnerConfig.for_model(
        ModelConfig.from_directory(tiny_llama_dir), dtype="float32", device="cpu", cudagraph_mode=mode,
        pipeline=PipelineConfig(parallel=parallel), pack_dir=None,
    )  # fmt: skip
    options = replace(options, dbo_decode_token_threshold=decode, dbo_prefill_token_threshold=prefill)
    batches = [batch_of(rank, *drawn) for rank, drawn in enumerate(ranks)]
    found = agreed(batches, options)

    def plain_decode(batch: StepInput) -> bool:
        return batch.num_tokens == batch.num_requests == len(batch.logit_rows)

    def may_be_two(batch: StepInput) -> bool:
        least = decode if batch.num_tokens == batch.num_requests else prefill
        rows = batch.logit_rows.tolist()
        return batch.num_requests > 1 and batch.num_tokens >= least and rows == sorted(rows)

    working = [b for b in batches if b.num_tokens]
    sizes = [[part.num_tokens for part in parts] for parts, _ in found]
    assert all(each == sizes[0] for each in sizes)
    assert len(sizes[0]) == 1 + (two and bool(working) and all(map(may_be_two, working)))
    most = [max(int((parts[i].slot_mapping >= 0).sum()) for parts, _ in found) for i in range(len(sizes[0]))]
    if mode != "none" and not all(map(plain_decode, batches)):  # as it may be recorded
        most = [next(size for size in options.capture_sizes if size >= tokens) for tokens in most]
    assert sizes[0] == most
    for batch, (parts, own_rows) in zip(batches, found, strict=True):
        given_ids, own = [], [part.slot_mapping >= 0 for part in parts]
        for part, owned, rows in zip(parts, own, own_rows, strict=True):
            part.check()
            assert owned.tolist() == sorted(owned.tolist(), reverse=True), "padding stands before a rank's own"
            given_ids += part.token_ids[part.logit_rows[:rows]].tolist()
            for ids, length, table in requests_of(part, own=False):
                assert len(ids) == length and not any(table), "a request of padding reads what is not its own"
        assert given_ids == batch.token_ids[batch.logit_rows].tolist()
        for name in ("token_ids", "positions", "slot_mapping"):
            kept = torch.cat([getattr(part, name)[owned] for part, owned in zip(parts, own, strict=True)])
            assert torch.equal(kept, getattr(batch, name)), name
        assert [r for part in parts for r in requests_of(part, own=True)] == requests_of(batch, own=True)
        if all(map(plain_decode, batches)):  # a recorded decode step serves each part
            assert all(map(plain_decode, parts)) and all((part.query_starts.diff() == 1).all() for part in parts)
        if len(parts) == 2 and batch.num_tokens:  # cut where they are as alike as can be
            cuts = batch.query_starts[1:-1]
            assert abs(2 * int(own[0].sum()) - batch.num_tokens) == int((2 * cuts - batch.num_tokens).abs().min())
