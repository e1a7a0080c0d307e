"""What a checkpoint file holds: tensors known by shape and dtype, whose values are read when they are asked for.

Values are read with plain file reads into memory of their own. A memory map would read the same bytes through page
faults (measured on SmolLM2-135M, 269 MB, 2 cores: copy out of a map 0.5-1.7 s, reads 0.06 s), leaves tensors aligned
to 8 bytes, and kills the process when somebody saves over the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Identity = tuple[int, ...]  # of the file whose header was read: device, inode, size, time of change


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a checkpoint.

    stored_dtype  as its format spells it
    dtype         it is read as; None where Seamwise does not read it
    load          returns it on the CPU, contiguous; ValueError when the file is damaged or has changed
    """

    shape: tuple[int, ...]
    stored_dtype: str
    dtype: torch.dtype | None
    load: Callable[[], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSlice:
    """Bytes of a file that must not change between the reading of its header and of these bytes."""

    path: Path
    identity: Identity
    start: int
    num_bytes: int

    def read(self) -> Tensor:
        """Return the bytes, uint8 (num_bytes,). Raises ValueError when the file has changed."""
        raw = torch.empty(self.num_bytes, dtype=torch.uint8)
        view, done = raw.numpy().data, 0
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            while done < self.num_bytes and (got := file.readinto(view[done:])):  # at most 2 GiB a read on Linux
                done += got
            if done < self.num_bytes or identity_of(file.fileno()) != self.identity:
                raise changed(self.path)
        return raw


def identity_of(file: int | Path) -> Identity:
    """Return what tells an open file, or the file at a path, from another one or from a later state of itself."""
    stat = os.stat(file)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def changed(path: Path) -> ValueError:
    return ValueError(f"{path}: the file changed while it was read; load it again")
