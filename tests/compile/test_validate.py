"""Every pass is validated; a wrong rewrite is refused, and bisect names the op that it broke."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from seamwise.compile import pipeline
from seamwise.compile.check.bisect import ulp_histogram
from seamwise.compile.check.validate import TOLERANCE, InvalidRewrite
from seamwise.compile.pipeline import PipelineConfig
from seamwise.compile.startup_times import Ledger
from seamwise.kernels import add_rms_norm
from seamwise.passes import FUSE_ADD_RMS_NORM, Pass, Report
from seamwise.runtime.build.bisect import bisect, parse_run
from seamwise.runtime.build.compile_model import compile_model
from seamwise.runtime.build.drawn_steps import CASES
from seamwise.runtime.build.model_config import ModelConfig
from seamwise.runtime.build.runner_config import RunnerConfig
from seamwise.runtime.serve.cli import main


def compiled(path: Path, entry: str, dtype: str = "float32") -> Any:
    config = ModelConfig.from_directory(path)
    options = RunnerConfig.for_model(
        config, dtype=dtype, entry=entry, device="cpu", pipeline=PipelineConfig(validate=True), pack_dir=None
    )
    return compile_model(config, options, Ledger())[0]


def wrong_eps(module: GraphModule, report: Report) -> None:
    """Change one number in the last layer, and nothing else."""
    last = [n for n in module.graph.nodes if n.target is add_rms_norm.op][-1]
    last.args = (*last.args[:3], 1e-2)


WRONG = Pass(name="wrong_eps", rewrite=wrong_eps)


@pytest.mark.parametrize(("entry", "dtype"), [("own", "float32"), ("transformers", "bfloat16")])
def test_every_pass_has_a_certificate(tiny_llama_dir: Path, entry: str, dtype: str) -> None:
    reports = compiled(tiny_llama_dir, entry, dtype).reports
    assert sum(r.matched for r in reports) > 10
    for report in reports:
        assert report.certificate is not None and report.certificate["cases"] == list(CASES)
        assert report.certificate["max_error"] <= TOLERANCE


def test_a_wrong_rewrite_is_refused(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "FUSE", (*pipeline.FUSE, WRONG))
    with pytest.raises(InvalidRewrite, match="wrong_eps: the logits changed by"):
        compiled(tiny_llama_dir, "own")


def test_bisect_names_the_op_that_a_wrong_rewrite_broke(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "FUSE", (FUSE_ADD_RMS_NORM, WRONG))
    case = list(CASES)[-1]
    result = bisect(tiny_llama_dir, "", "without=all", case=case, tolerance=1e-4)
    assert result.first is not None and result.first.op == "logits"  # the norms themselves are not in both
    monkeypatch.setattr(pipeline, "FUSE", (FUSE_ADD_RMS_NORM,))
    assert bisect(tiny_llama_dir, "", "without=all", case=case, tolerance=1e-4).first is None
    assert bisect(tiny_llama_dir, "", "entry=transformers,run=reference", case=case, tolerance=1e-4).first is None


def test_bisect_shows_where_bfloat16_begins_to_differ(tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bisect", "--model", str(tiny_llama_dir), "--b"]
    assert main([*command, "dtype=bfloat16"]) == 1
    printed = capsys.readouterr().out
    assert "first op that differs: " in printed and "ulp" in printed and "model." in printed
    assert main([*command, "run=meaning"]) == 0
    assert "no op differs" in capsys.readouterr().out
    assert main([*command, "speed=fast"]) == 2
    assert "'speed=fast' is not understood" in capsys.readouterr().err


def test_ulps_are_counted_at_the_larger_magnitude() -> None:
    one = torch.ones(4, dtype=torch.float64)
    eps = torch.finfo(torch.bfloat16).eps
    other = torch.tensor([1.0, 1 + eps, 1 + 5 * eps, float("nan")], dtype=torch.float64)
    assert ulp_histogram(one, other, torch.bfloat16) == {0: 1, 1: 1, 4: 1, 2**62: 1}


def test_a_run_is_described_in_words() -> None:
    assert parse_run("entry=own,without=fuse_qkv,without=fuse_gate_up")["without"] == ["fuse_qkv", "fuse_gate_up"]
