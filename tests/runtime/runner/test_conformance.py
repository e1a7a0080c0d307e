"""The runners of this project keep the protocol; and a runner that breaks it is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from seamwise import ModelRunner
from seamwise.testing import FakeRunner, RunnerConformance


class TestFakeRunner(RunnerConformance):
    def make_runner(self, num_blocks: int) -> Any:
        return FakeRunner(num_blocks=num_blocks, block_size=4)


class TestModelRunner(RunnerConformance):
    tolerance = 2e-5

    @pytest.fixture(autouse=True)
    def _load(self, tiny_llama_dir: Path, pack_dir: Path) -> None:
        self.load = lambda: ModelRunner.load(
            tiny_llama_dir, device="cpu", max_model_len=64, block_size=4, pack_dir=pack_dir, num_speculative_tokens=3
        )

    def make_runner(self, num_blocks: int) -> Any:
        runner = self.load()
        runner.allocate_kv(num_blocks)
        return runner


class Broken(FakeRunner):
    """Breaks one thing that the protocol asks for."""

    def __init__(self, fault: str) -> None:
        super().__init__(num_blocks=64, block_size=4)
        self.fault = fault

    def step(self, batch: Any) -> Any:
        if self.fault == "adapters":
            batch = replace(batch, adapter_slots=None)
        if self.fault == "slots":
            return replace(super().step(batch), request_slots=torch.zeros(2, dtype=torch.int32))
        if self.fault == "writes when empty" and not batch.num_tokens:
            self.cache[:] = 5
        if self.fault == "null block" and batch.num_requests > 1:
            batch = replace(batch, block_table=batch.block_table * 0 + 1)
        out = super().step(batch)
        if self.fault == "last row only" and len(out.logits):
            return replace(out, logits=out.logits[-1:].expand(len(out.logits), -1))
        if self.fault == "neighbours":
            return replace(out, logits=out.logits + batch.num_requests)
        return out


@pytest.mark.parametrize(
    ("fault", "found_by"),
    [
        ("adapters", "test_what_is_wrong_is_refused_and_changes_nothing"),
        ("slots", "test_whom_a_step_is_for_comes_back"),
        ("writes when empty", "test_an_empty_step_changes_nothing"),
        ("last row only", "test_drafts_are_verified_in_one_step_and_may_be_taken_back"),
        ("null block", "test_chunks_and_neighbours_do_not_show"),
        ("neighbours", "test_chunks_and_neighbours_do_not_show"),
    ],
)
def test_a_fault_is_found(fault: str, found_by: str) -> None:
    suite = RunnerConformance()
    suite.make_runner = lambda num_blocks: Broken(fault)  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        getattr(suite, found_by)()
