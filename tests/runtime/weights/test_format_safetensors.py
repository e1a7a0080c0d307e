"""A damaged safetensors file is refused by name; a whole one is read as its own library reads it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import draw, load, save

from seamwise.runtime.weights.format_safetensors import read_safetensors


def build_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "a header of 0 bytes in a file of 0"),
        (b"\x00" * 8, "a header of 0 bytes"),
        (build_file({}, length=1 << 63), "a header of 9223372036854775808 bytes in a file of 10"),
        (build_file(b"[]"), "the header is not an object"),
        (build_file(b"\xff\xff"), "utf-8"),
        (build_file(b"[" * 100_000), "recursion"),
        (build_file({"a": 1}), "the entry of a is not an object"),
        (build_file({"a": {}}), "wanted dtype, shape and data_offsets"),
        (build_file({"a": entry(shape=[-2])}, bytes(8)), "wanted dtype, shape and data_offsets"),
        (build_file({"a": entry(shape=[2.0])}, bytes(8)), "wanted dtype, shape and data_offsets"),
        (build_file({"a": entry(offsets=[0, True])}, bytes(8)), "wanted dtype, shape and data_offsets"),
        (build_file({"a": entry(offsets=[8, 0])}, bytes(8)), "a of dtype F32 and shape"),
        (build_file({"a": entry(shape=[3])}, bytes(8)), "a of dtype F32 and shape .3,. has 8 bytes"),
        (build_file({"a": entry(shape=[1 << 70])}, bytes(8)), "has 8 bytes"),
        (build_file({"a": entry(offsets=[4, 12])}, bytes(12)), "a starts at byte"),
        (build_file({"a": entry(), "b": entry()}, bytes(8)), "b starts at byte"),
        (build_file({"a": entry()}, bytes(7)), "it is truncated or damaged"),
        (build_file({"a": entry()}, bytes(9)), "it is truncated or damaged"),
    ],
)
def test_a_damaged_file_is_named(content: bytes, named: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s)model\.safetensors: not a readable safetensors file: .*{named}"):
        load(tmp_path)


def test_a_header_agrees_with_safetensors_own_reader(tmp_path: Path) -> None:
    from safetensors import safe_open

    odd = {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "flags": torch.ones(3, dtype=torch.bool)}
    tensors = draw() | odd
    save(tmp_path, tensors)
    header = read_safetensors(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as theirs:
        assert sorted(theirs.keys()) == sorted(header)
        for name, stored in header.items():
            assert list(stored.shape) == theirs.get_slice(name).get_shape()
            assert stored.stored_dtype == theirs.get_slice(name).get_dtype()
            if stored.dtype is not None:
                assert torch.equal(stored.load(), tensors[name])
