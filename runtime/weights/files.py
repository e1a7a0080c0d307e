"""What a checkpoint file holds: tensors known by shape and dtype, whose values are read when they are asked for.

Values are read with plain file reads into memory of their own. A memory map would read the same bytes through page
faults (measured on SmolLM2-135M, 269 MB, 2 cores: copy out of a map 0.5-1.7 s, reads 0.06 s), leaves tensors aligned
to 8 bytes, and kills the process when somebody saves over the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
    read_part     the same for a range (dimension from the first, start, end); None where the format has no such way
    packed        the tensors that the same values may be read as where they are quantized, by the end of their names
    """

    shape: tuple[int, ...]
    stored_dtype: str
    dtype: torch.dtype | None
    load: Callable[[], Tensor]
    read_part: Callable[[int, int, int], Tensor] | None = None
    packed: Mapping[str, StoredTensor] = field(default_factory=dict)

    def load_part(self, dim: int, start: int, end: int) -> Tensor:
        """Return the range start : end of a dimension, reading no more where the format allows."""
        dim %= len(self.shape)
        if self.read_part is None:
            return self.load().narrow(dim, start, end - start).clone()
        return self.read_part(dim, start, end)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSlice:
    """Bytes of a file that must not change between the reading of its header and of these bytes."""

    path: Path
    identity: Identity
    start: int
    num_bytes: int

    def read(self) -> Tensor:
        """Return the bytes, uint8 (num_bytes,). Raises ValueError when the file has changed."""
        return self.read_rows(1, 0, self.num_bytes)

    def read_rows(self, rows: int, start: int, end: int) -> Tensor:
        """Return bytes start : end of each of as many equal rows, uint8 (rows · (end - start),)."""
        width = end - start
        raw = torch.empty(rows * width, dtype=torch.uint8)
        view = raw.numpy().data
        with self.path.open("rb", buffering=0) as file:
            for row in range(rows):
                file.seek(self.start + row * (self.num_bytes // rows) + start)
                done, last = row * width, (row + 1) * width
                while done < last and (got := file.readinto(view[done:last])):  # at most 2 GiB a read on Linux
                    done += got
                if done < last:
                    raise changed(self.path)
            if identity_of(file.fileno()) != self.identity:
                raise changed(self.path)
        return raw


def identity_of(file: int | Path) -> Identity:
    """Return what tells an open file, or the file at a path, from another one or from a later state of itself."""
    stat = os.stat(file)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def changed(path: Path) -> ValueError:
    return ValueError(f"{path}: the file changed while it was read; load it again")
