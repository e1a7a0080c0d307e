"""GGUF files: metadata, then where each tensor lies, then the tensors. No number in them is believed unchecked.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from seamwise.runtime.weights.files import FileSlice, Identity, identity_of

from .quants import KINDS

_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
_PART = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")
_MOST_DIMENSIONS = 4  # the format's own limit


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """A tensor: its shape in PyTorch's order, its kind, and its bytes (of a kind that is not in KINDS: none)."""

    shape: tuple[int, ...]
    kind: str
    where: FileSlice


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """Everything but the values; a float32 of the metadata stands as the shortest decimal that rounds to it."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file, or of all parts of one, of which any may be named. Raises ValueError naming the
    file for anything but complete ones."""
    named, files = _PART.fullmatch(path.name), [path]
    if named:
        files = [path.with_name(f"{named[1]}-{i:05}-of-{named[2]}.gguf") for i in range(1, int(named[2]) + 1)]
    try:
        return _read_parts(tuple((file, identity_of(file)) for file in files))
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{path}: not a readable GGUF file: {error}; download it again") from error


@lru_cache(maxsize=1)  # configuration, tokenizer and weights ask for it one after the other
def _read_parts(files: tuple[tuple[Path, Identity], ...]) -> GgufHeader:
    whole: GgufHeader | None = None
    for i, (path, identity) in enumerate(files):
        header = _read(path, identity)
        said = header.metadata.get("split.no", 0), header.metadata.get("split.count", 0) or 1
        if said != (i, len(files)):
            says = f"{path.name} says that it is split.no {said[0]} of {said[1]}, its name {i} of {len(files)}"
            raise ValueError(f"{says}; keep llama.cpp's names, like -00001-of-00002.gguf")
        whole = whole or header
        if whole is not header and (twice := header.tensors.keys() & whole.tensors.keys()):
            raise ValueError(f"{path.name} has {min(twice)}, which another part has too")
        whole.tensors.update(header.tensors)
    assert whole is not None
    return whole


def _read(path: Path, identity: Identity) -> GgufHeader:
    with path.open("rb") as file:
        cursor = _Cursor(file, size=identity[2])
        if cursor.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if (version := cursor.natural(4)) not in (2, 3):
            raise ValueError(f"version {version}, wanted 2 or 3, little-endian")
        num_tensors, num_pairs = cursor.natural(8), cursor.natural(8)
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = cursor.string()
            if key in metadata:
                raise ValueError(f"its metadata has {key} twice")
            metadata[key] = cursor.value(cursor.natural(4))
        entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(num_tensors):
            name, rank = cursor.string(), cursor.natural(4)
            if name in entries or rank > _MOST_DIMENSIONS:
                raise ValueError(f"{name} is there twice, or has {rank} dimensions, wanted at most {_MOST_DIMENSIONS}")
            shape = tuple(cursor.natural(8) for _ in range(rank))[::-1]
            entries[name] = shape, cursor.natural(4), cursor.natural(8)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}, wanted a positive number")
    start = -(-cursor.at // alignment) * alignment
    tensors, end = {}, start
    for name, (shape, kind, offset) in sorted(entries.items(), key=lambda entry: entry[1][2]):
        num_bytes = _num_bytes(name, shape, kind)
        if start + offset < end or start + offset + num_bytes > identity[2]:
            raise ValueError(
                f"{name} has bytes {start + offset} to {start + offset + num_bytes}, wanted them from {end}, where the"
                f" tensor before it ends, to {identity[2]}, the end of the file: it is truncated or damaged"
            )
        end = start + offset + num_bytes
        where = FileSlice(path=path, identity=identity, start=start + offset, num_bytes=num_bytes)
        tensors[name] = GgufTensor(shape=shape, kind=TYPES.get(kind, f"ggml type {kind}"), where=where)
    return GgufHeader(path=path, metadata=metadata, tensors=tensors)


def _num_bytes(name: str, shape: tuple[int, ...], kind: int) -> int:
    if kind not in TYPES:
        return 0  # its size is not known here, and it is not read
    stored = KINDS[TYPES[kind]]
    if not shape or shape[-1] % stored.block:
        raise ValueError(f"{name} of shape {shape} has no whole rows of {TYPES[kind]}, {stored.block} values a block")
    return math.prod(shape) // stored.block * stored.num_bytes


class _Cursor:
    """Reads on through a file, never past its end and never more at once than is there."""

    def __init__(self, file: IO[bytes], *, size: int) -> None:
        self.at = 0
        self._file = file
        self._size = size

    def take(self, num_bytes: int) -> bytes:
        if num_bytes > self._size - self.at:
            raise ValueError(
                f"it has {self._size} bytes, {num_bytes} are wanted at byte {self.at}: it is truncated or damaged"
            )
        taken = self._file.read(num_bytes)
        if len(taken) < num_bytes:
            raise ValueError("the file changed while it was read")
        self.at += num_bytes
        return taken

    def natural(self, num_bytes: int) -> int:
        return int.from_bytes(self.take(num_bytes), "little")

    def string(self) -> str:
        return self.take(self.natural(8)).decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            of, count = self.natural(4), self.natural(8)
            return [self.string() for _ in range(count)] if of == _STRING else self._numbers(of, count).tolist()
        number = self._numbers(kind, 1)[0]
        return float(str(number)) if number.dtype == np.float32 else number.item()

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in _NUMBERS:
            raise ValueError(f"a metadata value of type {kind} at byte {self.at}")
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)
