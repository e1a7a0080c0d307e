"""Beside a slow link, two batches in turns take little more than the longer of computation and communication.

Two processes, gloo, and steps of a tiny mixture of experts; what the machine is too fast for is stated and slept: the
link lets a rank's rows out one after the other, each in so many ms, and what has come is computed on for as long a row.
`python tests/runtime/distributed/test_link.py --plot FILE.png` measures links from none to twice the computation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from seamwise import ModelRunner
from seamwise.bench.command_line import picture
from seamwise.bench.gpu.models import model_directory
from seamwise.kernels.comm import exchange
from seamwise.runtime.build.step import ragged_step
from seamwise.runtime.distributed.group import leave_group

REQUESTS, TOKENS, COMPUTE_MS = 8, 4, 1.0


class Link:
    """A rank's way out, in the place of `exchange._send`; and what is computed on rows that have come.

    row_s  seconds of each row on the way; link_s, compute_s: what was stated since `begin`, in all
    """

    def __init__(self, rank: int) -> None:
        self.rank, self.send, self.row_s = rank, exchange._send, 0.0
        self.begin()

    def begin(self) -> None:
        self.link_s = self.compute_s = self.free_s = 0.0

    def __call__(self, rows_XB: Tensor, coming_R: Tensor, going_R: Tensor, group: str) -> Callable[[], Tensor]:
        finish, rows = self.send(rows_XB, coming_R, going_R, group), int(going_R.sum() - going_R[self.rank])
        arrives_s = self.free_s = max(self.free_s, time.perf_counter()) + rows * self.row_s
        self.link_s += rows * self.row_s

        def finished() -> Tensor:
            time.sleep(max(arrives_s - time.perf_counter(), 0.0))
            came = finish()
            time.sleep(rows * COMPUTE_MS / 1e3)
            self.compute_s += rows * COMPUTE_MS / 1e3
            return came

        return finished


def work(rank: int, home: str, links_ms: Sequence[float], repeats: int) -> None:
    """Time steps of one batch and of two, in turns, at each link; rank 0 writes a row for each."""
    torch.set_num_threads(1)
    root = Path(home)
    dist.init_process_group("gloo", init_method=f"file://{root / 'group'}", rank=rank, world_size=2)
    exchange._send = link = Link(rank)  # type: ignore[assignment]
    try:
        load: dict[str, Any] = {
            "data_parallel_size": 2, "enable_expert_parallel": True, "device": "cpu", "load_format": "dummy",
            "cudagraph_mode": "piecewise", "pack_dir": root / f"packs{rank}",
        }  # fmt: skip
        with model_directory("qwen3-30b-a3b", tiny=True) as model:
            runners = {
                "one": ModelRunner.load(model, **load),
                "two": ModelRunner.load(model, enable_dbo=True, dbo_prefill_token_threshold=2, **load),
            }
        table = np.arange(1, REQUESTS + 1, dtype=np.int32)[:, None]
        ids = np.random.default_rng(rank).integers(512, size=REQUESTS * TOKENS)
        batch = ragged_step(ids, table, np.zeros(REQUESTS, int), np.full(REQUESTS, TOKENS), 16)
        for runner in runners.values():
            runner.allocate_kv(REQUESTS + 1)
            runner.step(batch)  # is recorded
        rows = []
        for link.row_s in (ms / 1e3 for ms in links_ms):
            row: dict[str, float] = {}
            for name, runner in runners.items():
                taken = []
                for _ in range(repeats):
                    dist.barrier()
                    link.begin()
                    began = time.perf_counter()
                    runner.step(batch)
                    taken.append(time.perf_counter() - began)
                row[name] = 1e3 * statistics.median(taken)
            said = torch.tensor([link.link_s, link.compute_s])
            dist.all_reduce(said, dist.ReduceOp.MAX)
            row["link"], row["compute"] = (1e3 * said).tolist()
            rows.append(row)
        assert runners["two"].recording_stats.steps["in_turns"] == 1 + repeats * len(links_ms)
        if rank == 0:
            (root / "rows.json").write_text(json.dumps(rows))
    finally:
        exchange._send = link.send
        leave_group()


def measure(home: Path, links_ms: Sequence[float], repeats: int) -> list[dict[str, float]]:
    """Return for each link the ms of a step: of one batch, of two, what the link says of it, and the computation."""
    torch.multiprocessing.spawn(work, (str(home), links_ms, repeats), nprocs=2)
    rows: list[dict[str, float]] = json.loads((home / "rows.json").read_text())
    return rows


@pytest.mark.slow
def test_two_batches_approach_the_longer_of_link_and_computation(tmp_path: Path) -> None:
    (row,) = measure(tmp_path, [COMPUTE_MS], 3)
    assert row["link"] == pytest.approx(row["compute"]) and row["link"] > 50
    assert row["one"] > row["link"] + row["compute"] - 1  # nothing is hidden, and all of it is slept
    assert row["compute"] - 1 < row["two"] < 0.75 * row["one"]


def main() -> None:
    """Measure, print a line for each link, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path, required=True, help="the picture to write (PNG)")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        rows = measure(Path(home), [COMPUTE_MS * part / 4 for part in range(9)], options.repeats)
    for row in rows:
        print("  ".join(f"{name} {ms:6.1f} ms" for name, ms in row.items()))
    links = [row["link"] for row in rows]
    with picture(options.plot, 7, 4.5) as axes:
        axes.plot(links, [row["one"] for row in rows], "o-", label="one batch")
        axes.plot(links, [row["two"] for row in rows], "o-", label="two in turns")
        axes.plot(links, [row["link"] + row["compute"] for row in rows], "C0:", label="computation + link")
        axes.plot(links, [max(row["link"], row["compute"]) for row in rows], "C1:", label="the longer of the two")
        axes.set(xlabel="link, ms a step", ylabel="step, ms", ylim=(0, None))
        axes.legend()


if __name__ == "__main__":
    main()
