"""Safetensors files: a JSON header that says where each tensor's bytes lie, then the bytes without gaps.

Source: https://huggingface.co/docs/safetensors/index#format.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypeGuard

import torch

from .files import FileSlice, Identity, StoredTensor, identity_of

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_READ = {
    **DTYPES, "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
_LARGEST_HEADER = 100_000_000  # bytes; the format's own limit


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file. Raises ValueError naming the file for anything but a complete one."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            head = file.read(8)
            if head == b"version ":
                raise ValueError("it is a pointer of Git LFS, not the file itself; run `git lfs pull`")
            length = int.from_bytes(head, "little")
            if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length).decode())
            identity = identity_of(file.fileno())
        if not isinstance(header, dict):
            raise ValueError("the header is not an object")
        header.pop("__metadata__", None)
        start = 8 + length
        slices = {name: _slice(path, identity, name, entry, start) for name, entry in header.items()}
        end = start
        for name, s in sorted(slices.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
            if s.start != end:
                raise ValueError(f"{name} starts at byte {s.start}, wanted {end}, where the tensor before it ends")
            end = s.start + s.num_bytes
        if end != size:
            raise ValueError(f"the header describes {end} bytes, the file has {size}: it is truncated or damaged")
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{path}: not a readable safetensors file: {error}; download it again") from error
    return {name: _stored(header[name], slices[name]) for name in header}


def _slice(path: Path, identity: Identity, name: str, entry: Any, start: int) -> FileSlice:
    if not isinstance(entry, dict):
        raise ValueError(f"the entry of {name} is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(dtype, str) and _naturals(shape) and _naturals(offsets) and len(offsets) == 2):
        raise ValueError(f"the entry of {name} is {entry!r:.200}, wanted dtype, shape and data_offsets")
    num_bytes = offsets[1] - offsets[0]
    if num_bytes < 0 or (dtype in _READ and num_bytes != math.prod(shape) * _READ[dtype].itemsize):
        raise ValueError(f"{name} of dtype {dtype} and shape {tuple(shape)} has {num_bytes} bytes")
    return FileSlice(path=path, identity=identity, start=start + offsets[0], num_bytes=num_bytes)


def _stored(entry: dict[str, Any], where: FileSlice) -> StoredTensor:
    dtype, shape = _READ.get(entry["dtype"]), tuple(entry["shape"])

    def load() -> torch.Tensor:
        assert dtype is not None
        return where.read().view(dtype).view(shape)

    def read_part(dim: int, start: int, end: int) -> torch.Tensor:
        assert dtype is not None
        step = math.prod(shape[dim + 1 :]) * dtype.itemsize
        read = where.read_rows(math.prod(shape[:dim]), start * step, end * step)
        return read.view(dtype).view(*shape[:dim], end - start, *shape[dim + 1 :])

    return StoredTensor(shape=shape, stored_dtype=entry["dtype"], dtype=dtype, load=load, read_part=read_part)


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
