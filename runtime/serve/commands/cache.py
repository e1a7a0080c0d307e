"""`seamwise cache`: what lies in the caches, and how large it is; clear removes it."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from seamwise import caches

from .options import Commands, add_command

_WHAT = {
    "cpp": "compiled CPU kernels", "packs": "compiled models", "made": "notes of named packs made here",
    "tokenizers": "tokenizers as transformers makes them", "models": "the demo model",
}  # fmt: skip
_CLEARED = ("cpp", "packs", "tokenizers")  # by default: all of it is made again when it is needed
_DAY_S = 24 * 3600


def add(commands: Commands) -> None:
    what = "list what the caches hold, with sizes, or clear them: what is needed again is made again"
    parser = add_command(commands, "cache", run, what)
    parser.add_argument("action", choices=("list", "clear"), nargs="?", default="list")
    kinds = f"what to list or clear: {', '.join(caches.KINDS)} (all; clear: {', '.join(_CLEARED)})"
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=kinds)
    parser.add_argument("--older-than", type=float, default=0.0, metavar="DAYS", help="only what was not used since")


def run(options: argparse.Namespace) -> int:
    """`seamwise cache [list|clear] [KIND…]`: print each cache's size, or remove what it holds.

    Raises ValueError for a kind that there is not.
    """
    if unknown := [kind for kind in options.kinds if kind not in caches.KINDS]:
        raise ValueError(f"there is no cache {unknown[0]!r}; there are: {', '.join(caches.KINDS)}")
    if options.older_than < 0:
        raise ValueError(f"--older-than {options.older_than:g}: wanted days, 0 or more")
    clear = options.action == "clear"
    print(caches.cache_dir())
    for kind in options.kinds or (_CLEARED if clear else caches.KINDS):
        entries = _entries(caches.folder(kind), options.older_than)
        size = sum(map(_bytes, entries))
        if clear:
            for entry in entries:
                caches.remove(entry)
        verb = "removed " if clear else ""
        print(f"  {kind:12}{verb}{len(entries):5} entries {size / 2**20:10.1f} MiB  {_WHAT[kind]}")
    return 0


def _entries(folder: Path, days: float) -> list[Path]:
    """Return what lies in a cache's folder and was last used longer ago than so many days."""
    if not folder.is_dir():
        return []
    before = time.time() - days * _DAY_S
    return [entry for entry in sorted(folder.iterdir()) if not days or entry.lstat().st_mtime < before]


def _bytes(entry: Path) -> int:
    inside = entry.rglob("*") if entry.is_dir() and not entry.is_symlink() else (entry,)
    return sum(path.lstat().st_size for path in inside if path.is_symlink() or path.is_file())
