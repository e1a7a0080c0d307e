"""`seamwise bench step`: the parts of a decode step add up, and every GEMM of the model is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from seamwise.runtime.serve.cli import main


def test_parts_add_up_to_the_step(tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    command = ["bench", "step", "--model", str(tiny_llama_dir), "--dtype", "float32", "--batch", "1,3"]
    assert main([*command, "--context", "20", "--json", str(out)]) == 0
    one, three = json.loads(out.read_text())["rows"]
    for row in (one, three):
        parts = row["gemm_us"] + row["attention_us"] + row["other_kernels_us"] + row["host_us"]
        assert parts == pytest.approx(row["step_us"]) and row["gemm_us"] > 0 and row["attention_us"] > 0
        assert sum(row["by_kernel_us"].values()) == pytest.approx(row["step_us"] - row["host_us"])
    # qkv 128 x 64, o 64 x 64, gate_up 256 x 64, down 64 x 128 in each of 2 layers, and the head 512 x 64
    weights = 4 * (2 * (128 * 64 + 64 * 64 + 256 * 64 + 64 * 128) + 512 * 64)
    assert one["gemm_gb_per_s"] * one["gemm_us"] * 1e3 == pytest.approx(weights)
    assert three["gemm_gflop_per_s"] * three["gemm_us"] * 1e3 == pytest.approx(3 * weights / 4 * 2)
    assert "GEMM" in capsys.readouterr().out
