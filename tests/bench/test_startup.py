"""`seamwise bench startup`: distinct pieces do not grow with depth, and a warm start does not trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from seamwise.runtime.serve.cli import main


def test_depth_adds_no_distinct_piece(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert main(["bench", "startup", "--layers", "3,6", "--json", str(out)]) == 0
    shallow, deep = json.loads(out.read_text())["rows"]
    assert shallow["distinct"] == deep["distinct"] == 3 and (shallow["pieces"], deep["pieces"]) == (4, 7)
    for row in (shallow, deep):
        assert "capture" in row["cold_stages_s"] and "capture" not in row["warm_stages_s"]
    assert "distinct" in capsys.readouterr().out
