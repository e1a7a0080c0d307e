"""Collective ops between processes: gloo runs what NCCL runs; a fake group of many ranks gives shapes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from seamwise.kernels import (
    allreduce_rms_norm,
    allreduce_rms_norm_quant,
    ep_combine,
    ep_dispatch,
    ep_dispatch_quant,
    norm_between_linears,
    quantize,
    reduce_scatter_rms_norm,
)
from seamwise.kernels.comm import collectives
from seamwise.kernels.comm import norm_between_linears as norm_between_linears_file
from seamwise.runtime.distributed.group import leave_group, meet

ROWS, WIDTH = 8, 40


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same_on_all_ranks(x: Tensor, ranks: int) -> bool:
    others = [torch.empty_like(x) for _ in range(ranks)]
    dist.all_gather(others, x)
    return all(torch.equal(x, other) for other in others)


def check_norms(rank: int, ranks: int, group: str) -> None:
    """Fused sums and norms equal F.rms_norm of the sum in float64, and are the same bits on every rank."""
    xs, weight = [draw(r, ROWS, WIDTH) for r in range(ranks)], draw(100, WIDTH)
    share = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    for residual in (None, draw(101, ROWS, WIDTH)):
        exact = sum(x.double() for x in xs) + (0 if residual is None else residual.double())
        expected = F.rms_norm(exact, (WIDTH,), weight.double(), 1e-5).float()
        own = None if residual is None else residual[share]
        for name in ("torch", "collective"):
            normed, total = allreduce_rms_norm.run(name, xs[rank], residual, weight, 1e-5, group)
            torch.testing.assert_close(normed, expected)
            torch.testing.assert_close(total, exact.float())
            assert same_on_all_ranks(normed, ranks) and same_on_all_ranks(total, ranks)
            q, scale, also = allreduce_rms_norm_quant.run(
                name, xs[rank], residual, weight, 1e-5, group, torch.int8, 16, None
            )
            wanted, wanted_scale = quantize(normed, torch.int8, 16)
            torch.testing.assert_close(scale, wanted_scale)
            assert torch.equal(also, total) and int((q.int() - wanted).abs().max()) <= 1 and same_on_all_ranks(q, ranks)
            for gather in (False, True):
                rows, kept = reduce_scatter_rms_norm.run(name, xs[rank], own, weight, 1e-5, group, gather)
                torch.testing.assert_close(rows, expected if gather else expected[share])
                torch.testing.assert_close(kept, exact[share].float())
    exact, share = sum(x[:7].double() for x in xs), -(-7 // ranks)  # rows that do not divide: the last is padding
    rows, kept = reduce_scatter_rms_norm(xs[rank][:7], None, weight, 1e-5, group, True)
    torch.testing.assert_close(rows, F.rms_norm(exact, (WIDTH,), weight.double(), 1e-5).float())
    padded = torch.cat((exact, torch.zeros_like(exact)))[rank * share :][:share]
    torch.testing.assert_close(kept, padded.float())


def check_overlap(rank: int, ranks: int, group: str) -> None:
    """What stands between two linear layers is the same by every provider; torch's fused GEMMs by its fallbacks.

    A workspace of 7 rows is reserved for them, and the whole of 8 goes without.
    """
    torchs, fused = import_module("torch.distributed._symmetric_memory"), []

    def scatter(x: Tensor, *args: Any) -> Tensor:
        fused.append(x.shape[0])
        return torchs._fused_matmul_reduce_scatter_fallback(x, *args)

    library = torch.library.Library("symm_mem", "IMPL")
    library.impl("fused_all_gather_matmul", torchs._fused_all_gather_matmul_fallback, "CPU")
    library.impl("fused_matmul_reduce_scatter", scatter, "CPU")
    none = torch.empty(0)
    shared = collectives.SharedMemory(dist.group.WORLD, none, None, none, workspace_bytes=7 * WIDTH * 4)
    collectives._SHARED[group] = shared
    for rows in (0, 1, 3, ROWS):
        share = -(-rows // ranks)
        x, down, up = draw(rank, rows, 12), draw(50 + rank, WIDTH, 12), draw(60 + rank, 5, WIDTH)
        for residual, bias in ((None, None), (draw(70 + rank, share, WIDTH), draw(80, 5))):
            args = (x, down, residual, 1 + draw(90, WIDTH), 1e-5, group, up, bias)
            wanted = norm_between_linears.run("torch", *args)
            for call in (
                norm_between_linears_file.norm_between_linears_symmetric,
                norm_between_linears_file.norm_between_linears_chunked,
            ):
                torch.testing.assert_close(call(*args), wanted)
    assert fused == [r + -r % ranks for r in (1, 1, 3, 3)]


def work(rank: int, ranks: int, file: str) -> None:
    torch.set_num_threads(1)
    meet(file, rank, ranks, "cpu", timeout_s=120)
    try:
        check_norms(rank, ranks, dist.group.WORLD.group_name)
        check_overlap(rank, ranks, dist.group.WORLD.group_name)
    finally:
        leave_group()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_between_processes(ranks: int, tmp_path: Path, run_ranks: Callable[..., None]) -> None:
    run_ranks(work, ranks, ranks, str(tmp_path / "group"))


def started_by_one_thread(rank: int) -> None:
    assert "\nThreads:\t1\n" in Path(f"/proc/{os.getppid()}/status").read_text()


def test_what_ranks_are_forked_from_has_one_thread(run_ranks: Callable[..., None]) -> None:
    """A thread that is not there after a fork may hold a lock for ever, OpenMP's above all."""
    run_ranks(started_by_one_thread, 1)


@pytest.fixture
def fake_group() -> Iterator[str]:
    """Rank 3 of 8 ranks that are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


def test_shapes_with_a_fake_group_of_eight(fake_group: str) -> None:
    with FakeTensorMode():
        x, weight = torch.empty(16, WIDTH, dtype=torch.bfloat16), torch.empty(WIDTH, dtype=torch.bfloat16)
        normed, total = allreduce_rms_norm(x, x, weight, 1e-5, fake_group)
        assert normed.shape == total.shape == (16, WIDTH) and normed.dtype == torch.bfloat16
        q, scale, _ = allreduce_rms_norm_quant(x, None, weight, 1e-5, fake_group, torch.float8_e4m3fn, 16)
        assert q.shape == (16, WIDTH) and scale.shape == (16, 3)
        for gather, rows in ((False, 2), (True, 15)):
            normed, total = reduce_scatter_rms_norm(x[:15], x[:2], weight, 1e-5, fake_group, gather)
            assert normed.shape == (rows, WIDTH) and total.shape == (2, WIDTH)


def test_shapes_of_expert_parallelism_with_a_fake_group_of_eight(fake_group: str) -> None:
    with FakeTensorMode():
        x, experts = torch.empty(5, WIDTH, dtype=torch.bfloat16), torch.empty(5, 2, dtype=torch.int32)
        rows, local = ep_dispatch(x, experts, 16, fake_group)
        assert rows.shape == (40, WIDTH) and local.shape == (40, 2) and local.dtype == torch.int32
        q, scale = quantize(x, torch.float8_e4m3fn, 16)
        q, scale, local = ep_dispatch_quant(q, scale, experts, 16, fake_group)
        assert q.shape == (40, WIDTH) and scale.shape == (40, 3) and local.shape == (40, 2)
        assert ep_combine(rows.repeat(2, 1), local, experts, 16, fake_group).shape == (10, WIDTH)
