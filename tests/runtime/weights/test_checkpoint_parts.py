"""A part of a tensor is that part of the whole, from every format, and no more is read of a safetensors file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from seamwise.compile.parameter import Parameter
from seamwise.runtime.weights.checkpoint import open_source
from seamwise.runtime.weights.files import FileSlice
from seamwise.runtime.weights.format_safetensors import read_safetensors

SHAPE = (5, 6, 7)
WANTED = Parameter(shape=SHAPE)


@given(dim=st.integers(-3, 2), ends=st.tuples(st.integers(0, 5), st.integers(0, 5)), seed=st.integers(0, 9))
def test_a_part_is_that_part(
    dim: int, ends: tuple[int, int], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("parts")
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    save_file({"before": torch.ones(3), "x": x}, directory / "model.safetensors")
    torch.save({"before": torch.ones(3), "x": x}, directory / "pytorch_model.bin")
    start, end = sorted(ends)
    for load_format in ("safetensors", "pt"):
        source = open_source(
            directory,
            {"before": Parameter(shape=(3,)), "x": WANTED},
            dtype=torch.float32,
            device="cpu",
            load_format=load_format,
        )
        part = source.read("x", dtype=torch.float32, device="cpu", part=(dim, start, end))
        assert part.is_contiguous() and torch.equal(part, x.float().narrow(dim, start, end - start))
    dummy = open_source(directory, {"x": WANTED}, dtype=torch.float32, device="cpu", load_format="dummy")
    whole = dummy.read("x", dtype=torch.float32, device="cpu")
    part = dummy.read("x", dtype=torch.float32, device="cpu", part=(dim, start, end))
    assert torch.equal(part, whole.narrow(dim, start, end - start))


def test_no_more_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, num_bytes, original = tmp_path / "model.safetensors", 0, FileSlice.read_rows
    save_file({"x": torch.randn(SHAPE)}, path)

    def counted(self: FileSlice, rows: int, start: int, end: int) -> torch.Tensor:
        nonlocal num_bytes
        read = original(self, rows, start, end)
        num_bytes += read.numel()
        return read

    monkeypatch.setattr(FileSlice, "read_rows", counted)
    for dim, size in enumerate(SHAPE):
        num_bytes = 0
        read_safetensors(path)["x"].load_part(dim, 1, 3)
        assert num_bytes == 2 * 4 * 5 * 6 * 7 // size


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.randn(SHAPE)}, path)
    stored = read_safetensors(path)["x"]
    path.write_bytes(path.read_bytes()[:-4])
    for part in ((0, 0, 5), (1, 5, 6)):
        with pytest.raises(ValueError, match="changed while it was read"):
            stored.load_part(*part)
