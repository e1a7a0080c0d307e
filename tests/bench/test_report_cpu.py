"""The page of CPU measurements is what its files say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from seamwise.bench.report import FOLDER
from seamwise.bench.report_cpu import render_cpu

MACHINE = {"device": "a machine", "instruction_set": "avx2"}


def write(folder: Path, name: str, **data: object) -> None:
    (folder / name).write_text(json.dumps({"machine": MACHINE, **data}))


def test_committed_page_is_what_its_files_say():
    assert (FOLDER / "CPU.md").read_text() == render_cpu(FOLDER), "run `seamwise bench report`"


def test_each_shape_of_a_file_becomes_a_table(tmp_path):
    ratios = {"what": "decode tok/s", "values": {"seamwise": 1234.5, "vllm": 2.0}, "ratios": {"vllm": 617.25}}
    write(tmp_path, "cpu-a.json", figures={"seamwise": {}, "vllm": {}}, table=[ratios])
    write(tmp_path, "cpu-b.json", shape={"streams": 64}, results={"answers": 4032, "share": 0.93671})
    write(tmp_path, "cpu-c.json", results={"x": {"ms": 1.5, "only": 7}, "y": {"ms": 2.5}})
    write(tmp_path, "cpu-d.json", rows=[{"layers": 4, "cold_s": 0.5, "stages": {"capture": 1.0}}])
    (tmp_path / "cpu-d.png").write_bytes(b"")
    page = render_cpu(tmp_path)
    for line in (
        "| decode tok/s | 1,234 | 2 | 617.25 x |", "streams 64", "| answers | 4,032 |", "| share | 0.9367 |",
        "|  | x | y |", "| ms | 1.5 | 2.5 |", "| only | 7 |  |", "| layers | cold_s |", "| 4 | 0.5 |",
        "![cpu-d](cpu-d.png)", "device a machine, instruction_set avx2",
    ):  # fmt: skip
        assert re.search(rf"^{re.escape(line)}$", page, re.MULTILINE), line
    assert "![cpu-a]" not in page


def test_a_file_without_figures_is_refused(tmp_path):
    write(tmp_path, "cpu-e.json", model="m")
    with pytest.raises(ValueError, match=r"cpu-e\.json: no figures"):
        render_cpu(tmp_path)
