"""`seamwise explain-key`: in what two packs differ."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Commands, add_command


def add(commands: Commands) -> None:
    what = "say in what two packs differ; the status is 1 when they do"
    parser = add_command(commands, "explain-key", run, what)
    parser.add_argument("packs", nargs=2, type=Path, metavar="PACK")


def run(options: argparse.Namespace) -> int:
    """`seamwise explain-key A B`: print the parts in which two packs' keys differ; the status is 1 when they do."""

    from seamwise.compile.pack import explain_key as differences
    from seamwise.compile.pack import manifest_of

    lines = differences(*(manifest_of(path)["parts"] for path in options.packs))
    print("\n".join(lines) or "the same key")
    return int(bool(lines))
