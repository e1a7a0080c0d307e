"""A GGUF header is read as llama.cpp's own package reads it, and nothing that it lies about is believed."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from seamwise.runtime.weights.gguf.file import read_gguf_header


def text(s: str | bytes) -> bytes:
    s = s if isinstance(s, bytes) else s.encode()
    return struct.pack("<Q", len(s)) + s


def tensor(name: str = "w", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    """shape in the file's order, fastest first."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file(pairs: bytes = b"", tensors: bytes = b"", data: bytes = b"", counts: tuple[int, int] = (0, 0)) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, counts[1], counts[0]) + pairs + tensors
    return head + bytes(-len(head) % 32) + data


HUGE = (1 << 63) - 1


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "it has 0 bytes, 4 are wanted at byte 0"),
        (b"GGML" + bytes(40), "it does not begin with GGUF"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(40), "version 1, wanted 2 or 3, little-endian"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(40), "version 50331648, wanted 2 or 3, little-endian"),
        (file(counts=(HUGE, 0)), "truncated"),
        (file(counts=(0, HUGE)), "truncated"),
        (file(struct.pack("<Q", HUGE), counts=(1, 0)), f"{HUGE} are wanted at byte 32"),
        (file(text(b"\xff"), counts=(1, 0)), "utf-8"),
        (file(text("a") + struct.pack("<I", 13), counts=(1, 0)), "a metadata value of type 13"),
        (file(text("a") + struct.pack("<IQ", 8, HUGE), counts=(1, 0)), f"{HUGE} are wanted"),
        (file(text("a") + struct.pack("<IIQ", 9, 4, HUGE), counts=(1, 0)), f"{4 * HUGE} are wanted"),
        (file(text("a") + struct.pack("<IIQ", 9, 8, HUGE), counts=(1, 0)), "truncated"),
        (file(text("a") + struct.pack("<IIQ", 9, 9, 1), counts=(1, 0)), "a metadata value of type 9"),
        (file((text("a") + struct.pack("<IB", 0, 1)) * 2, counts=(2, 0)), "its metadata has a twice"),
        (file(text("general.alignment") + struct.pack("<II", 4, 0), counts=(1, 0)), "general.alignment is 0"),
        (file(text("general.alignment") + struct.pack("<If", 6, 32), counts=(1, 0)), "general.alignment is 32.0"),
        (file(tensors=tensor() * 2, counts=(0, 2), data=bytes(32)), "w is there twice"),
        (file(tensors=tensor(shape=(1,) * 5), counts=(0, 1), data=bytes(32)), "has 5 dimensions, wanted at most 4"),
        (file(tensors=text("w") + struct.pack("<I", (1 << 32) - 1), counts=(0, 1)), "has 4294967295 dimensions"),
        (file(tensors=tensor(), counts=(0, 1), data=bytes(15)), "w has bytes 64 to 80, wanted them from 64"),
        (file(tensors=tensor(shape=(HUGE, HUGE)), counts=(0, 1), data=bytes(16)), "w has bytes 96 to 3402823669"),
        (file(tensors=tensor(offset=HUGE), counts=(0, 1), data=bytes(16)), "w has bytes 9223372036854775871"),
        (file(tensors=tensor() + tensor("v", offset=8), counts=(0, 2), data=bytes(64)), "v has bytes 104 to 120"),
        (file(tensors=tensor(kind=2, shape=(33,)), counts=(0, 1), data=bytes(64)), "no whole rows of Q4_0, 32 values"),
        (file(tensors=tensor(kind=12, shape=(32, 8)), counts=(0, 1), data=bytes(144)), "no whole rows of Q4_K"),
    ],
)
def test_a_lying_file_is_named(content: bytes, named: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s)model\.gguf: not a readable GGUF file: .*{named}"):
        read_gguf_header(path)


def test_a_header_agrees_with_the_gguf_packages_own_reader(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint8("a.u8", 255), writer.add_int8("a.i8", -1), writer.add_uint16("a.u16", 65535)
    writer.add_int16("a.i16", -2), writer.add_uint32("a.u32", 1 << 31), writer.add_int32("a.i32", -3)
    writer.add_uint64("a.u64", 1 << 63), writer.add_int64("a.i64", -4), writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.yes", True), writer.add_bool("a.no", False), writer.add_string("a.text", "naïve ▁東")
    writer.add_array("a.words", ["a", "", "▁東"]), writer.add_array("a.numbers", [1, -2, 3])
    writer.add_array("a.scores", [0.5, -1.25]), writer.add_custom_alignment(64)
    writer.add_tensor("rows", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("halves", np.arange(5, dtype=np.float16))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    header, theirs = read_gguf_header(path), GGUFReader(path)
    wanted: dict[str, Any] = {n: f.contents() for n, f in theirs.fields.items() if not n.startswith("GGUF.")}
    assert header.metadata == wanted and len(wanted) == 17
    for there in theirs.tensors:
        mine = header.tensors[there.name]
        assert mine.shape == tuple(int(n) for n in reversed(there.shape)) and mine.kind == there.tensor_type.name
        assert mine.where.start == there.data_offset and mine.where.read().numpy().tobytes() == there.data.tobytes()


def test_a_float32_is_the_decimal_it_was_written_from(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    numbers = {"eps": 1e-5, "theta": 1e6, "third": 0.1, "pi": 3.14159}
    for name, number in numbers.items():
        writer.add_float32(name, number)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.close()
    metadata = read_gguf_header(tmp_path / "model.gguf").metadata
    assert {n: metadata[n] for n in numbers} == numbers


def test_a_file_written_anew_is_read_anew(tmp_path: Path) -> None:
    for number in (1, 2):
        pair = text("a") + struct.pack("<IB", 0, number)
        (tmp_path / "new").write_bytes(file(pair, counts=(1, 0)))
        (tmp_path / "new").rename(tmp_path / "model.gguf")
        assert read_gguf_header(tmp_path / "model.gguf").metadata == {"a": number}
