"""NumPy archives: a zip of one .npy a tensor, compressed or not.

NumPy has no bfloat16; its arrays of ml_dtypes' come out as two opaque bytes ("V2"), which are read as bfloat16.
Source: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from .files import Identity, StoredTensor, changed, identity_of

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "|V2": torch.bfloat16}
_HIGHEST_RATIO = 1032  # of deflate; a size beyond it is a lie


def read_npz(path: Path) -> dict[str, StoredTensor]:
    """Read the headers of an archive. Raises ValueError naming the file for anything but a complete one."""
    found: dict[str, StoredTensor] = {}
    try:
        identity = identity_of(path)
        archive = zipfile.ZipFile(path)  # stays open as long as a tensor of it may be read
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name in found or name == info.filename:
                raise ValueError(f"its member {info.filename} is there twice, or no .npy file")
            ratio = 1 if info.compress_type == zipfile.ZIP_STORED else _HIGHEST_RATIO
            if info.file_size > ratio * info.compress_size:
                raise ValueError(f"{name} would have {info.file_size} bytes from {info.compress_size} in the file")
            found[name] = _stored(path, identity, archive, info)
    except Exception as error:  # a damaged file makes zipfile, zlib and numpy raise any of a dozen types
        raise _unreadable(path, error) from error
    return found


def _stored(path: Path, identity: Identity, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> StoredTensor:
    with archive.open(info) as file:
        shape, _, stored_dtype = _read_header(file)
        start = file.tell()
    num_bytes = info.file_size - start
    if num_bytes != math.prod(shape) * stored_dtype.itemsize:
        raise ValueError(f"{info.filename} of dtype {stored_dtype} and shape {shape} has {num_bytes} bytes")
    dtype = DTYPES.get(str(stored_dtype))

    def load() -> Tensor:
        assert dtype is not None
        try:
            with archive.open(info) as file:  # which compares the checksum at its end
                values = np.lib.format.read_array(file, allow_pickle=False)
        except Exception as error:  # as above
            raise _unreadable(path, error) from error
        if identity_of(path) != identity:
            raise changed(path)
        raw = torch.from_numpy(values.reshape(-1).view(np.uint8)).clone()  # numpy aligns to 16 bytes, torch to 64
        return raw.view(dtype).view(shape)

    return StoredTensor(shape=shape, stored_dtype=str(stored_dtype), dtype=dtype, load=load)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"npy version {version}, wanted (1, 0) or (2, 0)")


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: not a readable npz file: {error}; download it again")
