"""`seamwise replay`: plan again what a scheduler planned, and say whether it is the same."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Commands, add_command


def add(commands: Commands) -> None:
    what = "plan each step of a recording (decisions_dir) again; the status is 2 at the first that differs"
    parser = add_command(commands, "replay", run, what)
    parser.add_argument("recordings", nargs="+", type=Path, metavar="FILE")


def run(options: argparse.Namespace) -> int:
    """Print how many steps of each recording are planned as they were. Raises ValueError at the first that is not."""
    from seamwise.runtime.scheduler.replay import replay

    for path in options.recordings:
        if not path.is_file():
            raise ValueError(f"{path}: wanted a recording of decisions_dir, and there is no such file")
        print(f"{path}: {replay(path)} steps, each planned as it was")
    return 0
