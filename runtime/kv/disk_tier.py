"""Blocks in a folder, one file each, which outlive the process and may be shared by several.

A file is written under a temporary name and renamed, so that a block is there whole or not at all while the machine
runs, whoever is killed. It is not forced to the disk (no fsync): what a power failure leaves of it fails its checksum
and is computed again. The order of use is the files' modification time, so processes agree on it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from threading import Lock

from seamwise import caches

from .names import BlockName
from .tiers import Stored

_SUFFIX, _WRITING = ".kv", ".writing-"
_SCANS = 16  # the folder is read again after each such part of its capacity, so that others' files count too


class DiskTier:
    """The blocks of a folder, at most capacity_bytes of them; n processes that share it exceed that by n/16 at most.

    part  the name of a folder inside, for blocks of which others keep other parts

    Raises ValueError for a folder that cannot be made or that others can write: outputs follow from what it holds.
    """

    outlives = True

    def __init__(self, folder: Path, capacity_bytes: int, part: str = "") -> None:
        self.folder, self.capacity_bytes = folder / part, capacity_bytes
        self.used_bytes = 0
        self._written, self._made = 0, 0
        self._sizes: dict[str, int] = {}
        self.changed: deque[BlockName] = deque()
        self._lock = Lock()
        try:
            for each in (folder, self.folder):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
                _check_own(each)
            caches.remove_left_overs(self.folder, _WRITING)
            with self._lock:
                self._make_room(0)
        except OSError as error:
            raise ValueError(f"kv_offloading_folder={str(folder)!r}: {error}; name a folder of your own") from error

    def __contains__(self, name: BlockName) -> bool:
        file = name.hex() + _SUFFIX
        return file in self._sizes or os.path.exists(f"{self.folder}/{file}")  # another process may have written it

    def put(self, name: BlockName, stored: Stored) -> list[tuple[BlockName, Stored]]:
        """Write a block's file, removing those used least recently first. Raises OSError, and leaves no file then."""
        path, size = self._path(name), len(stored)
        with self._lock:
            self._made += 1
            writing = self.folder / f"{_WRITING}{os.getpid()}-{self._made}"
            if self.used_bytes + size > self.capacity_bytes or self._written > self.capacity_bytes // _SCANS:
                self._make_room(size)
        try:
            with writing.open("xb") as file:
                file.write(stored)
            writing.rename(path)
        except BaseException:
            writing.unlink(missing_ok=True)
            raise
        with self._lock:
            self._note(path.name, size)
            self._written += size
        return []

    def get(self, name: BlockName) -> Stored | None:
        path = self._path(name)
        try:
            stored = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:  # removed since, by us or another process
            with self._lock:
                self._note(path.name, 0)
            return None
        return stored

    def remove(self, name: BlockName) -> None:
        with self._lock:
            self._remove(self._path(name).name)

    def let_go(self) -> list[tuple[BlockName, Stored]]:
        return []

    def _path(self, name: BlockName) -> Path:
        return self.folder / (name.hex() + _SUFFIX)

    def _note(self, file: str, size: int) -> None:
        self.used_bytes += size - self._sizes.pop(file, 0)
        if size:
            self._sizes[file] = size
        else:
            self._say((file,))

    def _say(self, files: Iterable[str]) -> None:
        """Note that these files came or went."""
        for file in files:
            with contextlib.suppress(ValueError):  # a file of somebody else's
                self.changed.append(bytes.fromhex(file.removesuffix(_SUFFIX)))

    def _remove(self, file: str) -> None:
        (self.folder / file).unlink(missing_ok=True)
        self._note(file, 0)

    def _make_room(self, size: int) -> None:
        """Read what is there, and remove the files used least recently until so many bytes more fit."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(_SUFFIX):
                    with contextlib.suppress(FileNotFoundError):  # another process was first
                        is_at = entry.stat()
                        found.append((is_at.st_mtime_ns, entry.name, is_at.st_size))
        before, self._sizes = self._sizes, {name: bytes_ for _, name, bytes_ in found}
        self._say(before.keys() ^ self._sizes.keys())
        self.used_bytes, self._written = sum(self._sizes.values()), 0
        if self.used_bytes + size <= self.capacity_bytes:
            return
        kept = self.capacity_bytes - max(size, self.capacity_bytes // _SCANS)  # more than one: reading it takes a while
        for _, name, _ in sorted(found):
            if self.used_bytes <= kept:
                break
            self._remove(name)


def _check_own(folder: Path) -> None:
    found = folder.stat()
    if found.st_uid not in (os.geteuid(), 0) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(
            f"kv_offloading_folder={str(folder)!r} can be written by others (mode {stat.filemode(found.st_mode)}),"
            " and outputs follow from what it holds; `chmod go-w` it, or name a folder of your own"
        )
