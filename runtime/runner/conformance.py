"""What every runner must do, as tests that any of them can run: subclass it in a test file and make yours.

    class TestMyRunner(RunnerConformance):
        def make_runner(self, num_blocks):
            return MyRunner(..., num_blocks=num_blocks)

A runner has `step`, `block_size`, `config.vocab_size`. Its answers are compared with its own for one request computed
whole and alone: how a scheduler cuts, mixes and places requests must not show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seamwise.runtime.build.step import StepInput, empty_step, ragged_step

_LENGTHS = (19, 3, 33, 8)


class RunnerConformance:
    """Tests by pytest's names; each makes a runner of its own.

    tolerance   of logits, relative and absolute: 0 where a row's logits do not depend on its neighbours in bits
    """

    tolerance = 0.0

    def make_runner(self, num_blocks: int) -> Any:
        """Return a runner whose KV cache has as many blocks, the null block included."""
        raise NotImplementedError("make_runner(num_blocks) returns the runner to be tested")

    def test_chunks_and_neighbours_do_not_show(self) -> None:
        cache = _Requests(self.make_runner(64))
        want = [self._alone(tokens) for tokens in cache.requests]
        schedule = (
            {0: 3, 2: 16},
            {1: 1, 0: 11, 2: 1},
            {2: 2, 1: 1, 0: 1, 3: 5},
            {0: 1, 1: 1, 2: 1, 3: 1},
            {0: 3, 3: 2},
        )
        for counts in schedule:
            rows = cache.step(counts).split([*counts.values()])
            for (r, count), got in zip(counts.items(), rows, strict=True):
                self._assert_equal(got, want[r][cache.computed[r] - count : cache.computed[r]])

    def test_drafts_are_verified_in_one_step_and_may_be_taken_back(self) -> None:
        cache = _Requests(self.make_runner(64))
        want = self._alone(cache.requests[0])
        cache.step({0: 10})
        drafted = [*cache.requests[0][10:12], 1 + cache.requests[0][12] % 2, cache.requests[0][13]]
        self._assert_equal(cache.step({0: 4}, {0: drafted})[:2], want[10:12])
        cache.computed[0] = 12  # the third was wrong: it and what follows are computed again, over what they left
        self._assert_equal(cache.step({0: 7}), want[12:19])

    def test_a_prefix_is_shared(self) -> None:
        cache = _Requests(self.make_runner(64))
        size, tokens = cache.size, cache.requests[2]
        whole = len(tokens) // size - (len(tokens) % size == 0)
        want = self._alone(tokens)
        cache.step({2: len(tokens)})
        cache.requests[3], cache.tables[3] = tokens, [*cache.tables[2][:whole], *cache.spare]
        cache.computed[3] = whole * size
        self._assert_equal(cache.step({3: len(tokens) - whole * size}), want[whole * size :])

    def test_rows_that_are_not_wanted_cost_no_logits(self) -> None:
        cache = _Requests(self.make_runner(64))
        batch = cache.batch({0: 5, 1: 3}, {})
        every = cache.runner.step(batch).logits.clone()
        some = cache.runner.step(replace(batch, logit_rows=torch.tensor([7, 2]))).logits
        self._assert_equal(some, every[[7, 2]])
        none = cache.runner.step(replace(batch, logit_rows=torch.empty(0, dtype=torch.int64))).logits
        assert none.shape == (0, cache.runner.config.vocab_size)

    def test_an_empty_step_changes_nothing(self) -> None:
        cache = _Requests(self.make_runner(64))
        want = self._alone(cache.requests[0])
        cache.step({0: 9})
        assert cache.runner.step(empty_step()).logits.shape == (0, cache.runner.config.vocab_size)
        self._assert_equal(cache.step({0: 1}), want[9:10])

    def test_whom_a_step_is_for_comes_back(self) -> None:
        cache = _Requests(self.make_runner(64))
        slots, generations = torch.tensor([9, 4], dtype=torch.int32), torch.tensor([3, 1 << 40])
        batch = replace(cache.batch({0: 2, 1: 1}, {}), request_slots=slots, request_generations=generations)
        out = cache.runner.step(batch)
        assert torch.equal(out.request_slots, slots) and torch.equal(out.request_generations, generations)

    def test_what_is_wrong_is_refused_and_changes_nothing(self) -> None:
        cache = _Requests(self.make_runner(64))
        want = self._alone(cache.requests[0])
        cache.step({0: 9})
        fine = cache.batch({0: 2, 1: 1}, {})
        groups = {"slot_mapping": fine.slot_mapping.repeat(9, 1), "block_table": fine.block_table.repeat(9, 1, 1)}
        wrongs: tuple[dict[str, Any], ...] = (
            {"token_ids": fine.token_ids.int()}, {"slot_mapping": fine.slot_mapping[:-1]},
            {"request_slots": torch.zeros(2, dtype=torch.int32)}, groups,
            {"adapter_slots": torch.full((2,), 1 << 20, dtype=torch.int32)},
        )  # fmt: skip
        for wrong in wrongs:
            try:
                cache.runner.step(replace(fine, **wrong))
            except ValueError:
                continue
            raise AssertionError(f"a step with {wrong} was taken; wanted ValueError")
        self._assert_equal(cache.step({0: 1}), want[9:10])

    def _alone(self, tokens: Sequence[int]) -> Tensor:
        cache = _Requests(self.make_runner(64))
        cache.requests[0] = tokens
        cache.tables[0] = [*range(1, 1 - (-len(tokens) // cache.size))]
        return cache.step({0: len(tokens)})

    def _assert_equal(self, got: Tensor, want: Tensor) -> None:
        torch.testing.assert_close(got.float().cpu(), want.float().cpu(), atol=self.tolerance, rtol=self.tolerance)


class _Requests:
    """Drawn requests over a runner's cache: each owns blocks in a shuffled order."""

    def __init__(self, runner: Any) -> None:
        draw = np.random.default_rng(0)
        self.runner, self.size = runner, runner.block_size
        self.requests: list[Sequence[int]] = [draw.integers(3, runner.config.vocab_size, n).tolist() for n in _LENGTHS]
        owned = [-(-n // self.size) for n in _LENGTHS]
        order = (1 + draw.permutation(63)).tolist()
        self.tables = [order[sum(owned[:r]) : sum(owned[: r + 1])] for r in range(len(owned))]
        self.spare = order[sum(owned) :][:4]
        self.computed = [0] * len(owned)

    def batch(self, counts: Mapping[int, int], tokens: Mapping[int, Sequence[int]]) -> StepInput:
        table = np.zeros((len(counts), max(len(self.tables[r]) for r in counts)), dtype=np.int32)
        for row, r in enumerate(counts):
            table[row, : len(self.tables[r])] = self.tables[r]
        firsts, new = np.array([self.computed[r] for r in counts]), np.array([*counts.values()])
        spans = [self.requests[r][self.computed[r] : self.computed[r] + n] for r, n in counts.items()]
        given = [tokens.get(r, span) for r, span in zip(counts, spans, strict=True)]
        ids = np.array([t for span in given for t in span], dtype=np.int64)
        return ragged_step(ids, table, firsts, new, self.size, np.arange(len(ids)))

    def step(self, counts: Mapping[int, int], tokens: Mapping[int, Sequence[int]] | None = None) -> Tensor:
        """Compute more tokens of some requests, or others in their place; return all their logits."""
        logits: Tensor = self.runner.step(self.batch(counts, tokens or {})).logits.clone()
        for r, count in counts.items():
            self.computed[r] += count
        return logits
