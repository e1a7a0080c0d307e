"""A third party's package adds a pass through an entry point, placed beside a named one."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from seamwise.compile.pipeline import FUSE, FUSE_QUANT, LOWER, RAISE, ordered_passes
from seamwise.compile.plugins import Placed, placed_into
from seamwise.passes import FUSE_QKV, Pass
from seamwise.runtime.serve.cli import main

NOTHING = Pass(name="nothing", rewrite=lambda module, report: None)

PACKAGE = '''
"""An example package: counts the residual additions that are left, and changes nothing."""
import torch
from seamwise.compile.plugins import Placed
from seamwise.passes import Pass

def rewrite(module, report):
    report.matched = len(module.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor))

PLACED = Placed(entry=Pass(name="count_additions", rewrite=rewrite), after="raise_rope")
'''


def explain(rank: int, packages: Path, model: Path, written: Path) -> None:
    sys.path.insert(0, str(packages))
    with written.open("w") as out, contextlib.redirect_stdout(out):
        assert main(["explain", "--model", str(model), "--json", "--no-pack", "--validate"]) == 0


def test_an_installed_package_adds_its_pass(
    tiny_llama_dir: Path, tmp_path: Path, run_ranks: Callable[..., None]
) -> None:
    """In a process of its own, where nobody has asked for packages yet."""
    (tmp_path / "example_passes.py").write_text(PACKAGE)
    info = tmp_path / "example_passes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: example-passes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[seamwise.passes]\ncount = example_passes:PLACED\n")
    run_ranks(explain, 1, tmp_path, tiny_llama_dir, tmp_path / "written")
    passes = json.loads((tmp_path / "written").read_text())["passes"]
    names = [p["name"] for p in passes]
    assert names[names.index("raise_rope") + 1] == "count_additions"
    counted = next(p for p in passes if p["name"] == "count_additions")
    assert counted["matched"] == 4  # two residual sums in each of 2 layers
    assert counted["certificate"]["max_error"] == 0.0


def test_before_and_after_a_named_pass() -> None:
    (fused,) = placed_into([FUSE], [Placed(entry=NOTHING, before="fuse_qkv")])
    assert fused.index(NOTHING) == fused.index(FUSE_QKV) - 1
    assert [tuple(g) for g in ordered_passes()] == [RAISE, (), (*FUSE, *FUSE_QUANT), LOWER]


def test_a_place_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="'nothing' is placed beside 'fuse_moe'; there are: fuse_add_rms_norm"):
        placed_into([FUSE], [Placed(entry=NOTHING, after="fuse_moe")])
    with pytest.raises(ValueError, match="another pass has this name"):
        placed_into([FUSE], [Placed(entry=FUSE_QKV, after="fuse_qkv")])
    with pytest.raises(ValueError, match="wanted exactly one"):
        Placed(entry=NOTHING)
