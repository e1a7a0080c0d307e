"""Print the lines of source and tests by folder; fail when the source outgrows what a person can hold in the head."""

from __future__ import annotations

import sys
from pathlib import Path

LIMIT = 15_000
SOURCE = ("kernels", "passes", "compile", "model_defs", "runtime", "bench", "seamwise")
SUFFIXES = (".py", ".cpp", ".h")


def count(folder: Path) -> tuple[int, int, str]:
    """Return lines, files, and the longest file of a folder."""
    files = [p for p in folder.rglob("*") if p.suffix in SUFFIXES and "__pycache__" not in p.parts]
    sizes = {p: len(p.read_text().splitlines()) for p in files}
    longest = max(sizes, key=sizes.__getitem__, default=None)
    return sum(sizes.values()), len(files), f"{longest.name} {sizes[longest]}" if longest else "-"


def main() -> int:
    root = Path(__file__).parent.parent
    total = 0
    print(f"{'folder':12} {'lines':>6} {'files':>6}  longest")
    for name in (*SOURCE, "tests"):
        lines, files, longest = count(root / name)
        total += lines if name != "tests" else 0
        print(f"{name:12} {lines:6} {files:6}  {longest}")
    print(f"{'source':12} {total:6}         limit {LIMIT}")
    return int(total > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
