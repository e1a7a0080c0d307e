"""A whole model captured and lowered for a CUDA device that is not there: what serves it, by scheme."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dry_device import pretend

from seamwise.bench.gpu.models import model_directory
from seamwise.compile.startup_times import Ledger
from seamwise.runtime.build.model_config import ModelConfig
from seamwise.runtime.build.packs import load_program
from seamwise.runtime.build.runner_config import RunnerConfig


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "scheme"),
    [("llama-3-8b", None), ("llama-3-8b", "fp8"), ("llama-3-8b", "int8"), ("llama-3-8b", "w4a16"),
     ("qwen3-30b-a3b", None), ("qwen3-30b-a3b", "fp8")],
)  # fmt: skip
def test_every_op_of_a_step_has_a_kernel(model: str, scheme: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    options: dict[str, Any] = {
        "dtype": "bfloat16", "device": "cuda", "load_format": "dummy", "quantization": scheme, "max_model_len": 33,
        "pack_dir": None,
    }  # fmt: skip
    with model_directory(model, tiny=True) as directory:
        config = ModelConfig.from_directory(Path(directory))
        program, _ = load_program(config, RunnerConfig.for_model(config, **options), Ledger())
    plain = {key.split(":")[0] for key in program.providers if key.endswith(":torch")}
    assert not plain, f"by their meaning on CUDA: {sorted(plain)}"
    assert program.packages == {}, "nothing of these models needs Inductor"
