"""`seamwise bench company`: neighbours are there while an engine is measured, and gone afterwards."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from seamwise.bench import company


def test_engines_are_measured_beside_neighbours_that_end(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def counted(command: list[str], *args: Any, **kwargs: Any) -> Any:
        process = popen(command, *args, **kwargs)
        started.extend([process] if "while True: pass" in command else [])
        return process

    def run_engine(job: Any, **how: Any) -> dict[str, Any]:
        running = sum(process.poll() is None for process in started)
        return {"results": {"single": [{"decode_tokens_per_s": 100.0 / (1 + running)}]}}

    monkeypatch.setattr(company.subprocess, "Popen", counted)
    monkeypatch.setattr(company, "run_engine", run_engine)
    out = tmp_path / "{isa}.json"
    command = ["--model", str(tiny_llama_dir), "--neighbours", "0,1,2", "--rounds", "2", "--json", str(out)]
    assert company.main(command) == 0
    (written,) = tmp_path.iterdir()
    report = json.loads(written.read_text())
    assert written.stem == report["machine"]["instruction_set"]
    assert report["decode_tokens_per_s"] == {"seamwise": {"0": 100.0, "1": 50.0, "2": 100 / 3}}
    assert len(started) == 6 and all(process.poll() is not None for process in started)
    assert "1 busy neighbours:    50.0 tokens/s,  50 %" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--compare: no peer 'nobody'; there are: transformers, vllm, llama_cpp"):
        company.main([*command, "--compare", "nobody"])
    with pytest.raises(ValueError, match="--peer-python, --peer-model: 'vllm' is not compared with"):
        company.main([*command, "--peer-python", "vllm=/nowhere/python"])
    with pytest.raises(ValueError, match="--compare vllm: no interpreter at /nowhere/python"):
        company.main([*command, "--compare", "vllm", "--peer-python", "vllm=/nowhere/python"])
