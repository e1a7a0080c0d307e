"""Where Seamwise keeps what it makes: compiled kernels, packs, prepared tokenizers, the demo model.

All of it lies in one folder, moved by `set_cache_dir` (`LLM(cache_dir=…)`, `seamwise --cache-dir`) or by the
XDG_CACHE_HOME variable; this is the only file of the library that reads the environment, or sets any of it. What lies
there is run, so a folder is used only where nobody else can write.
Source: https://specifications.freedesktop.org/basedir-spec/latest/.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

KINDS = ("cpp", "packs", "made", "tokenizers", "models")
_LEFT_OVER_S = 3600  # nothing is written for longer: what is older was left behind by a killed process
_chosen: Path | None = None


def set_cache_dir(path: str | Path | None) -> None:
    """Keep everything below `path` from now on, in this process; None: where the system says."""
    global _chosen
    _chosen = None if path is None else Path(path).expanduser().absolute()


def cache_dir() -> Path:
    """Return the folder of all caches: the chosen one, $XDG_CACHE_HOME/seamwise, ~/.cache/seamwise.

    A user without a home directory has one below the system's folder for temporary files.
    """
    if _chosen is not None:
        return _chosen
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the specification: a relative one is ignored
        return Path(base) / "seamwise"
    try:
        return Path.home() / ".cache" / "seamwise"
    except RuntimeError:  # no HOME, and a user id without an entry in the passwd file
        return Path(tempfile.gettempdir()) / f"seamwise-{os.geteuid()}"


def folder(kind: str) -> Path:
    """Return the folder of one kind of cache, which need not exist."""
    assert kind in KINDS
    return cache_dir() / kind


def name_nameless_user() -> None:
    """Give a user id without a name one, by the environment, before torch's compiler is imported.

    torch 2.11's asks for it on import, to choose a folder, and fails; later ones take this name by themselves.
    """
    try:
        getpass.getuser()
    except (KeyError, ImportError, OSError):
        os.environ["USER"] = f"uid_{os.getuid()}"


def make_private(path: Path) -> Path:
    """Return a folder that only this user (or root) can write, made where it is missing.

    Raises OSError when it cannot be made, PermissionError when others can write it.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_private(path)
    return path


def check_private(path: Path) -> None:
    """Raise PermissionError when a file or folder belongs to, or can be written by, anyone but this user and root."""
    found = path.stat()
    if found.st_uid not in (os.geteuid(), 0):
        raise PermissionError(
            f"{path} belongs to user id {found.st_uid}, and what it holds would be run as {os.geteuid()}; `chown` it,"
            " or choose another folder with cache_dir="
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"{path} can be written by others (mode {stat.filemode(found.st_mode)}), and what it holds would be run;"
            f" `chmod go-w {path}`, or choose another folder with cache_dir="
        )


def remove_left_overs(path: Path, prefix: str) -> None:
    """Remove what killed processes left half written in a folder: entries of this prefix, older than an hour."""
    for entry in path.glob(f"{prefix}*"):
        try:
            old = time.time() - entry.lstat().st_mtime > _LEFT_OVER_S
        except FileNotFoundError:  # another process was first
            continue
        if old:
            remove(entry)


def keep_newest(path: Path, count: int) -> None:
    """Leave the entries of a folder that were used last, so many, and remove the others; hidden ones are left."""
    entries = []
    for entry in path.iterdir():
        if not entry.name.startswith("."):
            with contextlib.suppress(FileNotFoundError):  # another process was first
                entries.append((entry.stat().st_mtime, entry))
    for _, entry in sorted(entries, reverse=True)[count:]:
        remove(entry)


def remove(entry: Path) -> None:
    """Remove a file or a folder with all it holds; a link alone. Nothing happens where there is none."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)
