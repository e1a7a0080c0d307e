"""Passes of third parties, found by the entry point group "seamwise.passes" and placed beside a named pass.

An installed package declares, in its pyproject.toml,

    [project.entry-points."seamwise.passes"]
    my_fusion = "my_package.my_fusion:PLACED"

where PLACED is `Placed(pass, after="fuse_add_rms_norm")`.
Source: https://packaging.python.org/en/latest/specifications/entry-points/.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from seamwise.passes import Pass

GROUP = "seamwise.passes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A pass, and the one it stands directly before or after. Raises ValueError for both or none."""

    entry: Pass
    before: str | None = None
    after: str | None = None

    def __post_init__(self) -> None:
        if (self.before is None) == (self.after is None):
            raise ValueError(
                f"pass {self.entry.name!r}: got before={self.before!r}, after={self.after!r}; wanted exactly one"
            )


@cache
def discovered() -> tuple[Placed, ...]:
    """Return every installed package's placed passes, in the order of their entry points' names.

    Raises ValueError for an entry point that is no `Placed`.
    """
    found = []
    for point in sorted(entry_points(group=GROUP), key=lambda p: p.name):
        placed = point.load()
        if not isinstance(placed, Placed):
            raise ValueError(f"entry point {point.name!r} ({point.value}) is {type(placed).__name__}, wanted Placed")
        found.append(placed)
    return tuple(found)


def digests() -> dict[str, str]:
    """Return pass name -> digest of the file its rewrite is written in: part of a pack's key."""
    return {
        p.entry.name: hashlib.sha256(Path(inspect.getfile(p.entry.rewrite)).read_bytes()).hexdigest()[:16]
        for p in discovered()
    }


def placed_into(groups: Sequence[tuple[Pass, ...]], placed: Sequence[Placed]) -> list[list[Pass]]:
    """Return the groups of passes with the placed ones inserted. Raises ValueError for an unknown or a taken name."""
    result = [list(group) for group in groups]
    for new in placed:
        names = [p.name for group in result for p in group]
        beside = new.before or new.after
        if beside not in names:
            raise ValueError(f"pass {new.entry.name!r} is placed beside {beside!r}; there are: {', '.join(names)}")
        if new.entry.name in names:
            raise ValueError(f"pass {new.entry.name!r}: another pass has this name already")
        group = next(g for g in result if beside in [p.name for p in g])
        at = [p.name for p in group].index(beside)
        group.insert(at if new.before else at + 1, new.entry)
    return result
