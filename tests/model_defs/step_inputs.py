"""Step tensors for tests: requests of given lengths, scheduled in any chunks and mixes, over a paged cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from seamwise import ModelRunner, StepInput

Schedule = Sequence[Mapping[int, int]]  # a step: request -> how many of its tokens to compute


class Steps:
    """Makes the steps of some requests one by one; each owns blocks in a shuffled order, none is block 0.

    num_padding rows are appended to every step, with slot -1 and no request, and as many requests without queries.
    """

    def __init__(
        self, requests: Sequence[Sequence[int]], *, block_size: int = 4, num_padding: int = 0, seed: int = 0
    ) -> None:
        self.requests = requests
        self.block_size = block_size
        self.num_padding = num_padding
        self.computed = [0] * len(requests)
        counts = [-(-len(r) // block_size) for r in requests]
        self.num_blocks = sum(counts) + 1
        order = torch.randperm(self.num_blocks - 1, generator=torch.Generator().manual_seed(seed)) + 1
        self.blocks = [part.tolist() for part in order.split(counts)]

    def next(self, counts: Mapping[int, int]) -> dict[str, Tensor]:
        """Return the tensors of a step that computes counts[r] more tokens of each request r and all their logits."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for r, n in counts.items():
            span = range(self.computed[r], self.computed[r] + n)
            tokens += self.requests[r][span.start : span.stop]
            positions += span
            slots += [self.blocks[r][p // self.block_size] * self.block_size + p % self.block_size for p in span]
            starts.append(len(tokens))
            self.computed[r] += n
        rows = len(tokens)
        pad = self.num_padding
        table = [self.blocks[r] for r in counts] + [[0]] * pad
        width = max(len(b) for b in table)

        def int32(values: Sequence[object]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32)

        return {
            "token_ids": torch.tensor(tokens + [0] * pad),
            "positions": torch.tensor(positions + [0] * pad),
            "slot_mapping": torch.tensor(slots + [-1] * pad),
            "block_table": int32([b + [0] * (width - len(b)) for b in table]),
            "seq_lens": int32([self.computed[r] for r in counts] + [0] * pad),
            "query_starts": int32(starts + [rows] * pad),
            "logit_rows": torch.arange(rows),
        }

    def caches_of(self, model: Any) -> list[tuple[Tensor, Tensor]]:
        """Return the caches that a transformers class wants, of each call of its attention, full of NaN."""
        ids = torch.zeros(3, dtype=torch.int64)
        with torch.no_grad():
            called = model.attended(ids, ids, ids)
        return [c for heads, width in called for c in self.caches(1, heads, width, torch.float32)]

    def caches(self, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Return caches full of NaN: what is read before it is written shows in the logits."""
        shape = (self.num_blocks, kv_heads, self.block_size, head_dim)
        poison = torch.full(shape, torch.nan, dtype=dtype)
        return [(poison.clone(), poison.clone()) for _ in range(layers)]


def run_schedule(
    model: nn.Module, steps: Steps, schedule: Schedule, caches: Sequence[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """Run a schedule eagerly; return each request's logits, one row for each of its tokens computed."""
    with torch.no_grad():
        return _by_request(steps, schedule, lambda given: model(kv_caches=caches, **given))


def run_runner(
    runner: ModelRunner, requests: Sequence[Sequence[int]], schedule: Schedule, slots: Sequence[int] | None = None
) -> list[Tensor]:
    """Run a schedule by a runner, over caches of its own, each request with the adapter of its slot; return what
    `run_schedule` does."""
    steps = Steps(requests, block_size=runner.block_size)
    runner.allocate_kv(steps.num_blocks)
    order = iter(schedule)

    def step(given: dict[str, Tensor]) -> Tensor:
        of_step = None if slots is None else torch.tensor([slots[r] for r in next(order)], dtype=torch.int32)
        return runner.step(StepInput(**given, adapter_slots=of_step)).logits.clone()

    return _by_request(steps, schedule, step)


def _by_request(steps: Steps, schedule: Schedule, run: Callable[[dict[str, Tensor]], Tensor]) -> list[Tensor]:
    logits: list[list[Tensor]] = [[] for _ in steps.requests]
    for counts in schedule:
        rows = run(steps.next(counts))
        for r, part in zip(counts, rows.split(list(counts.values())), strict=True):
            logits[r].append(part)
    return [torch.cat(parts) for parts in logits]


def whole(requests: Sequence[Sequence[int]]) -> list[dict[int, int]]:
    """Return the schedule that computes every request in one step."""
    return [{r: len(tokens) for r, tokens in enumerate(requests)}]
