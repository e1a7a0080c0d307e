"""The verdicts of bench json-schema, on a suite of three schemas; a grammar that is too wide is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from seamwise.bench.json_schema import examine, main


def suite(folder: Path, *, mislabelled: bool) -> Path:
    tests = folder / "tests" / "draft2020-12"
    tests.mkdir(parents=True)

    def group(schema: Any, **instances: bool) -> dict[str, Any]:
        cases = [{"description": text, "data": json.loads(text), "valid": valid} for text, valid in instances.items()]
        return {"description": "drawn", "schema": schema, "tests": cases}

    groups = [
        group({"type": "integer"}, **{"1": True, '"1"': False, "2": not mislabelled}),
        group({"properties": {"a": {"type": "null"}}}, **{'{"b": 1, "a": null}': True, '{"a": 1}': False}),
        group({"maxLength": 2}, **{'"\\ud83d\\ude00"': True}),
        group({"not": {"type": "null"}}, null=False),
    ]
    (tests / "mixed.json").write_text(json.dumps(groups))
    return folder


def test_right_refused_and_wrong_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (got,) = examine(suite(tmp_path / "good", mislabelled=False), "draft2020-12")
    assert (got.served, got.refused.total(), got.right + got.narrower, got.wrong) == (3, 1, 6, [])
    assert "not" in str(got.refused) and got.right >= 5
    assert main(["--suite", str(tmp_path / "good"), "--json", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["keywords"][0]["refused"]
    assert main(["--suite", str(suite(tmp_path / "bad", mislabelled=True))]) == 1
    assert "wrong: drawn: 2: 2" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no tests; wanted the folder json/"):
        list(examine(tmp_path, "draft2020-12"))
