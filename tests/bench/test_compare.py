"""`seamwise bench throughput --compare`: engines in processes of their own, the table, its ratios, absent peers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from seamwise.bench import workloads
from seamwise.bench.compare import compare, table
from seamwise.runtime.cli import main


@pytest.mark.slow
def test_seamwise_beside_transformers(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = workloads.Workload(name="single", num_requests=1, shared_tokens=2, own_tokens=3, output_tokens=4)
    monkeypatch.setitem(workloads.WORKLOADS, "single", small)
    out, picture = tmp_path / "out.json", tmp_path / "ratios.png"
    command = ["bench", "throughput", "--model", str(tiny_llama_dir), "--workload", "single", "--dtype", "float32"]
    command += ["--max-model-len", "64", "--repeats", "2", "--compare", "transformers,vllm"]
    command += ["--peer-python", "vllm=/nowhere/python", "--json", str(out), "--plot", str(picture)]
    assert main(command) == 0
    report = json.loads(out.read_text())
    assert [len(runs) for runs in report["runs"].values()] == [2, 1]  # Seamwise first and last
    assert report["absent"] == {"vllm": "no interpreter at /nowhere/python"}
    row = next(r for r in report["table"] if r["what"].startswith("time to first token"))
    assert row["ratios"]["transformers"] == pytest.approx(row["values"]["transformers"] / row["values"]["seamwise"])
    printed = capsys.readouterr().out
    assert "x transformers" in printed and "vllm: not measured" in printed and picture.exists()


def test_a_peer_that_fails_costs_none_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_engine(job: Any, **how: Any) -> dict[str, Any]:
        if job["engine"] == "vllm":
            raise RuntimeError("vllm failed: no such operator")
        return {"results": {"single": [{"ttft_ms": 1.0}]}}

    monkeypatch.setattr("seamwise.bench.compare.run_engine", run_engine)
    peers = {"vllm": sys.executable, "transformers": sys.executable}
    monkeypatch.setattr("seamwise.bench.compare.available", lambda engine, python: None)
    report = compare("m", peers, workloads=["single"], vocab_size=9, settings={"repeats": 1}, startup=False)
    assert report["absent"] == {"vllm": "vllm failed: no such operator"}
    assert report["figures"] == {engine: {"single": {"ttft_ms": 1.0}} for engine in ("seamwise", "transformers")}


def test_ratios_above_one_are_better() -> None:
    figures = {
        "seamwise": {"single": {"decode_tokens_per_s": 30.0, "ttft_ms": 10.0}},
        "vllm": {"single": {"decode_tokens_per_s": 10.0, "ttft_ms": 30.0}},
    }
    assert [row["ratios"] for row in table(figures)] == [{"vllm": 3.0}, {"vllm": 3.0}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", "sglang"], "no peer 'sglang'"),
        (["--compare", "vllm", "--enforce-eager"], "leave out"),
        (["--plot", "x.png"], "belong to --compare"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["bench", "throughput", "--model", str(tiny_llama_dir), *arguments]) == 2
    assert message in capsys.readouterr().err
