"""Tables of measured winners: they change the order of providers, never which of them accept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from seamwise.kernels import scaled_linear, tuned
from seamwise.kernels.contract import Contract, Provider
from seamwise.kernels.signature import Signature

Tables = Callable[[str, list[list[Any]]], None]


@pytest.fixture
def op() -> Contract:
    """A contract of three providers that say their names; "even" takes even rows only."""

    def meaning(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    record = Contract(
        name="op", meaning=meaning, signature=Signature(meaning, {"x": "T D"}, lambda x: None), fake=meaning,
        flops=lambda x: 0, seam=False, mutates=(), opaque=False, reads_values=False,
    )  # fmt: skip
    record.providers.append(Provider(name="torch", call=lambda x: "torch"))
    record.tuned_by(lambda x: (x.shape[0], x.shape[1], "kind"))
    refuses = lambda x: "odd rows" if x.shape[0] % 2 else None  # noqa: E731
    record.provider("even", refuses=refuses)(lambda x: "even")
    record.provider("any")(lambda x: "any")
    return record


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tables:
    """Write a contract's entries as those measured on this machine."""

    def write(contract: str, entries: list[list[Any]]) -> None:
        (tmp_path / "cpu.json").write_text(json.dumps({contract: entries}))
        monkeypatch.setattr(tuned, "FOLDER", tmp_path)
        tuned.read_table.cache_clear()

    return write


def chosen(op: Contract, rows: int, width: int = 8) -> str:
    return op.choose([torch.empty(rows, width)]).name


def test_the_winner_of_the_least_bound_goes_first(op: Contract, tables: Tables) -> None:
    assert [chosen(op, rows) for rows in (4, 16, 64)] == ["even", "even", "even"]
    tables("op", [[64, 8, "kind", "torch"], [16, 8, "kind", "any"], [999, 8, "other", "torch"]])
    assert [chosen(op, rows) for rows in (4, 16, 17, 64, 66)] == ["any", "any", "torch", "torch", "even"]
    assert chosen(op, 16, width=9) == "even", "no entry has this shape"


def test_a_winner_that_refuses_is_passed_over(op: Contract, tables: Tables) -> None:
    tables("op", [[64, 8, "kind", "even"]])
    assert [chosen(op, 4), chosen(op, 5)] == ["even", "any"]
    assert op.choose([torch.empty(4, 8)], "torch").name == "torch", "what is asked for by name is used"
    tables("op", [[64, 8, "kind", "evn"]])
    with pytest.raises(ValueError, match="op: the measured winner 'evn' is none of its providers"):
        chosen(op, 4)


def test_rows_not_known_yet_are_chosen_at_each_call(op: Contract, tables: Tables) -> None:
    tables("op", [[16, 8, "kind", "any"], [64, 8, "kind", "torch"]])
    env = ShapeEnv()
    with FakeTensorMode(shape_env=env):
        rows = env.create_unbacked_symint()
        provider = op.choose([torch.empty(rows, 8)])
        assert op.choose([torch.empty(4, 8)]).name == "any"
    assert provider.name == "measured"
    assert [provider.call(torch.empty(rows, 8)) for rows in (4, 17)] == ["any", "torch"]
    with pytest.raises(ValueError, match="'measured' cannot serve this call: the rows are known"):
        op.choose([torch.empty(4, 8)], "measured")


def test_the_key_of_scaled_linear_tells_kinds_apart(tables: Tables) -> None:
    sizes = {"T": 3, "N": 130, "K": 200}
    rows, blocks, int8 = (
        scaled_linear.make_inputs({**sizes, **more}, dtype=torch.float32, device="cpu")
        for more in ({}, {"x_group": 128, "rows": 128, "columns": 128}, {"format": "int8"})
    )
    served = "torch_scaled_mm"
    assert [scaled_linear.choose(a).name for a in (rows, int8, blocks)] == [served, served, "torch"]
    tables("scaled_linear", [[3, 130, 200, "float8_e4m3fn", "torch"]])
    assert [scaled_linear.choose(a).name for a in (rows, int8, blocks)] == ["torch", served, "torch"]
    tables("scaled_linear", [[3, 130, 200, "float8_e4m3fn blocks", "torch"]])
    assert scaled_linear.choose(rows).name == served
