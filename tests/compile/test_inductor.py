"""Pieces with loose ops go to Inductor, once each, and compute what they computed, recorded or not."""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from step_inputs import Steps
from torch._inductor import config

from seamwise import ModelRunner, StepInput
from seamwise.compile.pipeline import PipelineConfig

LOOSE = PipelineConfig(disabled=("raise_swiglu",), allow_missed=("fuse_gate_up",), inductor="always")


@pytest.mark.slow
def test_compiled_pieces_equal_eager_ones(
    tiny_llama_dir: Path, pack_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_exit: list[Callable[[], Any]] = []
    monkeypatch.setattr(atexit, "register", lambda f, *args, **kwargs: at_exit.append(partial(f, *args, **kwargs)))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(config.aot_inductor, "precompile_headers", False)  # as in conftest.py
    requests = [list(range(3, 22)), [5, 6], [9] * 7]
    runs = []
    for pipeline in (PipelineConfig(inductor="never"), LOOSE, LOOSE):  # the second time from the pack
        runner = ModelRunner.load(tiny_llama_dir, dtype="float32", device="cpu", pipeline=pipeline, pack_dir=pack_dir)
        steps = Steps(requests, block_size=16)
        runner.allocate_kv(steps.num_blocks)
        logits = [runner.step(StepInput(**steps.next({0: 18, 1: 1, 2: 4}))).logits.clone()]
        logits += [runner.step(StepInput(**steps.next({0: 1, 1: 1, 2: 1}))).logits.clone()]
        for _ in range(2):  # recorded, then replayed
            logits.append(runner.step(StepInput(**steps.next({2: 1}))).logits.clone())
        runs.append((runner, logits))
    assert not runs[0][0].program.packages
    program = runs[1][0].program  # its first piece has kernels only, nothing to compile
    assert program.packages.keys() == {name for name, loose in program.loose_ops.items() if loose}
    assert (len(program.packages), program.num_distinct) == (2, 3)
    assert "compile" in runs[1][0].startup_s and "compile" not in runs[2][0].startup_s
    for _, logits in runs[1:]:
        for got, wanted in zip(logits, runs[0][1], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert list(tmp_path.glob("seamwise-*")), "where packages are made"
    for call in at_exit:
        call()
    assert not list(tmp_path.glob("seamwise-*"))
