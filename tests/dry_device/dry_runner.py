"""A runner on a CUDA device that is not there, as the product loads it: a real program, weights without values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dry_device import Seen, device, pretend

from seamwise.bench.gpu.models import model_directory
from seamwise.compile.record.recorder import CPURecorder
from seamwise.compile.startup_times import Ledger
from seamwise.runtime.build.loading import load_step_weights
from seamwise.runtime.build.model_config import ModelConfig
from seamwise.runtime.build.packs import load_program
from seamwise.runtime.build.ranks import placed
from seamwise.runtime.build.runner_config import RunnerConfig
from seamwise.runtime.build.step import StepInput
from seamwise.runtime.runner import recordings, runner
from seamwise.runtime.runner.runner import ModelRunner


@contextlib.contextmanager
def dry_runner(monkeypatch: pytest.MonkeyPatch, model: str, **options: Any) -> Iterator[tuple[ModelRunner, Seen]]:
    """Load a tiny model of bench gpu; steps run op by op, on shapes."""
    options = {
        "dtype": "bfloat16", "load_format": "dummy", "max_model_len": 33, "pack_dir": None, "enforce_eager": True,
    } | options  # fmt: skip
    with monkeypatch.context() as patch, model_directory(model, tiny=True) as directory:
        pretend(patch)
        config = ModelConfig.from_directory(Path(directory))
        settings = placed(RunnerConfig.for_model(config, **options))
        program, buffers = load_program(config, settings, Ledger())
        weights = load_step_weights(Path(directory), replace(settings, device="cpu"), program, buffers)

        def empty(*args: Any) -> list[torch.Tensor]:
            return [torch.empty_strided(w.shape, w.stride(), dtype=w.dtype, device=settings.device) for w in weights]

        patch.setattr(runner, "load_program", lambda *args: (program, buffers))
        patch.setattr(runner, "load_step_weights", empty)
        patch.setattr(recordings, "recorder_for", lambda device: CPURecorder())
        patch.setattr(ModelRunner, "_check_ready", lambda self, batch: None)  # it looks at values
        patch.setattr(runner, "check_alike", lambda value, what: None)  # there is no other rank to tell
        with device(patch, compiled=False) as seen:
            loaded = ModelRunner.load(directory, **options)
            loaded.allocate_kv(8)
            yield loaded, seen


def dry_step(tokens: int, requests: int) -> StepInput:
    """Return a step of so many tokens and requests, each of whose logits are wanted."""
    sizes = {"token_ids": (tokens,), "positions": (tokens,), "slot_mapping": (tokens,), "logit_rows": (requests,)}
    shorter = {"block_table": (requests, 3), "seq_lens": (requests,), "query_starts": (requests + 1,)}
    return StepInput(
        **{name: torch.empty(size, dtype=torch.int64) for name, size in sizes.items()},
        **{name: torch.empty(size, dtype=torch.int32) for name, size in shorter.items()},
    )
