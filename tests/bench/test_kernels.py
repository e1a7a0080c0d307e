"""`seamwise bench kernels`: what it lists, measures, writes and draws, at one small shape."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from seamwise.kernels.contract import CONTRACTS
from seamwise.runtime.serve.cli import main


def test_list_names_every_contract_with_its_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name} " in listed for name in CONTRACTS) and "2·T·D + D elements" in listed


def test_rows_json_and_roofline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CONTRACTS["rms_norm"], "shapes", {"small": {"T": 4, "D": 64}})
    out, picture = tmp_path / "out.json", tmp_path / "roof.png"
    command = ["bench", "kernels", "rms_norm", "--no-compile", "--json", str(out), "--plot", str(picture)]
    assert main([*command, "--dtype", "float32"]) == 0
    report = json.loads(out.read_text())
    (row,) = report["rows"]
    assert row["bytes"] == (2 * 4 * 64 + 64) * 4 and row["us"] > 0 and row["x_eager"] > 0
    assert row["peer"] == "torch F.rms_norm" and row["x_compile"] is None
    least_us = row["bytes"] / report["ceilings"]["copy_gb_per_s"] / 1e3
    assert row["of_roof"] == pytest.approx(least_us / row["us"])
    assert "rms_norm" in capsys.readouterr().out and picture.read_bytes().startswith(b"\x89PNG")


def test_what_is_slower_than_eager_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CONTRACTS["rms_norm"], "shapes", {"small": {"T": 64, "D": 512}})
    assert main(["bench", "kernels", "rms_norm", "grouped_linear", "--check-eager"]) == 0
    fast = next(p for p in CONTRACTS["rms_norm"].providers if p.name == "cpp")
    slow = replace(fast, call=lambda *args: (time.sleep(0.002), fast.call(*args))[1])
    monkeypatch.setattr(CONTRACTS["rms_norm"], "providers", [slow])
    assert main(["bench", "kernels", "rms_norm", "--check-eager"]) == 1
    out = capsys.readouterr().out
    assert "no op is slower" in out and "grouped_linear" not in out and out.count("slower than eager torch:") == 1


def test_an_unknown_contract_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "rms_nrom"]) == 2
    assert "no contract named 'rms_nrom'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bench", "option", "where"),
    [
        (("kernels", "--list"), ("--json", "rows.json"), "with --list"),
        (("kernels", "--check-eager"), ("--no-compile",), "with --check-eager"),
        (("engine",), ("--requests", "8"), "without --model"),
    ],
)
def test_an_option_that_nothing_would_read_is_refused(
    bench: tuple[str, ...], option: tuple[str, ...], where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["bench", *bench, *option])
    assert f"{option[0]} means nothing {where}" in capsys.readouterr().err
