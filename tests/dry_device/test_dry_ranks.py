"""Ranks on CUDA devices that are not there: what sums their parts, and on which device kernels are launched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dry_device import Seen, device, pretend
from dry_runner import dry_runner, dry_step
from torch._C import _distributed_c10d

from seamwise.bench.gpu.models import model_directory
from seamwise.kernels import allreduce_rms_norm
from seamwise.kernels.comm.collectives import share_memory, shared_memory
from seamwise.runtime.build.model_config import ModelConfig
from seamwise.runtime.build.ranks import placed, share_sums
from seamwise.runtime.build.runner_config import RunnerConfig
from seamwise.runtime.build.step import StepOutput
from seamwise.runtime.distributed.group import fake_group
from seamwise.runtime.engine import worker
from seamwise.runtime.sampling.sampler import Sampled

ALL_REDUCE = "_c10d_functional.all_reduce.default"
TWO_SHOTS = "symm_mem.two_shot_all_reduce_.default"


class Peers:
    """torch's symmetric memory, within reach or not; barriers are noted where kernels are."""

    reached = True
    seen = Seen()

    @staticmethod
    def empty_strided_p2p(size: Any, stride: Any, dtype: torch.dtype, device: Any, group: str) -> torch.Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device=device)

    @classmethod
    def rendezvous(cls, buffer: torch.Tensor) -> Any:
        if not cls.reached:
            raise RuntimeError("no peer access")
        return SimpleNamespace(buffer_ptrs=[0, 0], barrier=lambda: cls.seen.launches.append("barrier"))


@pytest.fixture(autouse=True)
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Peers]]:
    library = torch.library.Library("symm_mem", "IMPL")
    library.impl("two_shot_all_reduce_", lambda x, op, group: x, "Meta")
    monkeypatch.setattr(_distributed_c10d, "_SymmetricMemory", Peers)
    yield Peers
    Peers.reached = True


def summing(seen: Seen) -> list[str]:
    """Return what sums over ranks, in order of kind."""
    return [n for n in seen.launches if n in ("_sum_norm_kernel", "barrier")] + [
        op for op in seen.ops if op in (ALL_REDUCE, TWO_SHOTS)
    ]


@pytest.mark.slow
def test_the_product_sums_by_its_kernel_where_ranks_share_memory(
    peers: type[Peers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sum behind a layer is one kernel between two barriers, and nothing in a step could not be captured."""
    kernels = {}
    for disabled in (False, True):
        options = {"tensor_parallel_size": 2, "disable_custom_all_reduce": disabled, "device": "cuda"}
        with fake_group(2), dry_runner(monkeypatch, "llama-3-8b", **options) as (runner, seen):
            peers.seen = seen
            assert runner.program.providers["allreduce_rms_norm:triton"]
            inputs = runner._inputs(dry_step(6, 3))
            seen.copies.clear(), seen.launches.clear(), seen.ops.clear()
            runner.executable(*inputs)
            kernels[disabled], copies = summing(seen), list(seen.copies)
        assert copies == []
    sums = kernels[False].count("_sum_norm_kernel")
    assert sums == 5, "the embedding's, and two in each of two layers"
    assert kernels[False].count("barrier") == 2 * sums
    assert kernels[False].count(ALL_REDUCE) + sums == kernels[True].count(ALL_REDUCE)
    assert {*kernels[True]} == {ALL_REDUCE}


@pytest.mark.parametrize(
    ("rows", "dtype", "wanted"),
    [(8, torch.bfloat16, ["barrier", "_sum_norm_kernel", "barrier"]), (64, torch.bfloat16, [TWO_SHOTS]),
     (64, torch.float16, [ALL_REDUCE]), (1024, torch.bfloat16, [ALL_REDUCE])],
)  # fmt: skip
def test_eight_ranks_sum_by_size(
    rows: int, dtype: torch.dtype, wanted: list[str], peers: type[Peers], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_group(8), device(monkeypatch, compiled=False) as seen:
        peers.seen = seen
        group = torch.distributed.group.WORLD.group_name  # type: ignore[union-attr]
        share_memory(group, 8 << 20, torch.device("cuda:0"))
        before = shared_memory(group)
        share_memory(group, 8 << 20, torch.device("cuda:0"))
        assert before is not None and shared_memory(group) is before, "recorded steps read where it was"
        x, weight = (torch.empty(s, dtype=dtype, device="cuda") for s in ((rows, 8192), (8192,)))
        args = (x, x, weight, 1e-5, group)
        seen.copies.clear()
        assert allreduce_rms_norm.choose(args).name == "triton"
        allreduce_rms_norm.direct(*args)
        assert summing(seen) == wanted and seen.copies == []
    with fake_group(8):
        assert shared_memory(group) is None, "another group of the same name shares nothing yet"


def test_who_shares_memory_and_what_is_said_where_it_is_out_of_reach(
    peers: type[Peers], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(
        "seamwise.runtime.build.ranks.share_memory",
        lambda group, size, device, workspace: asked.append((device, workspace)),
    )
    with model_directory("llama-3-8b", tiny=True) as directory:
        config = ModelConfig.from_directory(Path(directory))
    overlapped = {"enable_sequence_parallel": True, "enable_async_tp": True}
    for size, device_, options in ((2, "cuda", {}), (2, "cpu", {}), (3, "cuda", {}), (2, "cuda", overlapped)):
        with fake_group(size):
            share_sums(placed(RunnerConfig.for_model(config, tensor_parallel_size=size, device=device_, **options)))
    assert asked == [(torch.device("cuda:0"), 0), (torch.device("cuda:0"), 64 << 20)]
    monkeypatch.undo()
    monkeypatch.setattr(_distributed_c10d, "_SymmetricMemory", peers)
    peers.reached = False
    pretend(monkeypatch)
    with fake_group(2), device(monkeypatch, compiled=False):
        options_ = placed(RunnerConfig.for_model(config, tensor_parallel_size=2, device="cuda"))
        with pytest.raises(RuntimeError, match="disable_custom_all_reduce=True, so that NCCL sums: no peer access"):
            share_sums(options_)


@pytest.mark.slow
def test_steps_run_on_the_models_device_in_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread begins with the first GPU as its current one, and kernels are launched there."""
    with dry_runner(monkeypatch, "llama-3-8b", device="cuda:1") as (runner, seen):
        torch.cuda.set_device("cuda:0")
        seen.launches.clear()
        assert runner.step(dry_step(6, 3)).logits.device == torch.device("cuda:1")
        assert len(seen.launches) > 4 and torch.cuda.current_device() == 0


def test_tokens_are_sampled_on_the_logits_device(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []

    def sample(logits: torch.Tensor, *args: Any) -> Sampled:
        found.append(torch.cuda.current_device())
        return Sampled(tokens=np.zeros(0, dtype=np.int64), logprobs={}, failed={})

    monkeypatch.setattr(worker, "sample", sample)
    none = np.zeros(0, dtype=np.int64)
    batch: Any = SimpleNamespace(
        fill_tokens=lambda history: None, inputs=None, prompts=[], sampling=SimpleNamespace(slots=none, positions=none)
    )
    with device(monkeypatch, compiled=False):
        logits = torch.empty(2, 5, device="cuda:1")
        steps: Any = SimpleNamespace(step=lambda inputs: StepOutput(logits=logits, hidden_states=None))
        worker.Worker(steps, threaded=False, mode="raw_logprobs").submit(batch, np.zeros((1, 1))).result()
        assert found == [1] and torch.cuda.current_device() == 0
