"""PyTorch files: whatever torch.save makes of a state dict, and nothing that runs code or is no such thing."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from seamwise.runtime.weights.format_torch import read_torch


def test_views_and_parameters_are_read_contiguous(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    tensors = {"rows": base[1:3], "turned": base.T, "strided": base[:, ::2], "parameter": nn.Parameter(base)}
    torch.save(tensors, tmp_path / "a.bin")
    for name, stored in read_torch(tmp_path / "a.bin").items():
        got = stored.load()
        assert torch.equal(got, tensors[name]) and got.is_contiguous() and not got.requires_grad
        assert got.untyped_storage().nbytes() == got.nbytes == tensors[name].nbytes


class Evil:
    def __reduce__(self) -> Any:
        return print, ("code of a checkpoint has run",)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (torch.zeros(3), "holds a Tensor, wanted a state dict"),
        ([torch.zeros(3)], "holds a list, wanted a state dict"),
        ({1: torch.zeros(3)}, "holds a dict, wanted a state dict"),
        ({"step": 3}, "step is a int, wanted a dense tensor"),
        ({"w": torch.zeros(3).to_sparse()}, "w is a Tensor, wanted a dense tensor"),
        ({"w": Evil()}, "not a readable PyTorch file: UnpicklingError"),
    ],
)
def test_what_is_no_state_dict_is_named(
    content: Any, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(ValueError, match=rf"a\.bin: {named}"):
        read_torch(tmp_path / "a.bin")
    assert not capsys.readouterr().out


def test_a_plain_pickle_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"a\.bin: not a readable PyTorch file"):
        read_torch(tmp_path / "a.bin")
    assert not capsys.readouterr().out


def test_the_format_before_torch_1_6_is_refused_with_the_fix(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(3)}, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"before 1\.6; save it again: torch\.save\(torch\.load\("):
        read_torch(tmp_path / "a.bin")


def test_a_tensor_larger_than_its_storage_is_refused_without_allocating(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(0x1234)}, tmp_path / "a.bin", pickle_protocol=2)
    whole = (tmp_path / "a.bin").read_bytes()
    size = b"M" + (0x1234).to_bytes(2, "little")  # BININT2
    assert whole.count(size) == 2  # the storage's and the tensor's
    at = whole.rindex(size)
    pickled = whole[:at] + b"M\xff\xff" + whole[at + 3 :]
    (tmp_path / "a.bin").write_bytes(pickled)
    with pytest.raises(ValueError, match=r"a\.bin: not a readable PyTorch file: RuntimeError"):
        read_torch(tmp_path / "a.bin")
