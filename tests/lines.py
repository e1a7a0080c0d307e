"""Print the lines of source and tests by folder; fail when the source outgrows what a person can hold in the head.

Counted is code: without blank lines, comments and docstrings, as tinygrad's sz.py counts. All lines stand beside it.
"""

from __future__ import annotations

import io
import sys
import tokenize
from pathlib import Path

# What everything this project is meant to do should fit in; a folder over its budget is a sign of a wrong design.
BUDGETS = {
    "kernels": 7_500, "passes": 2_500, "compile": 2_000, "model_defs": 1_600, "runtime": 11_500, "bench": 2_800,
    "seamwise": 100,
}  # fmt: skip
LIMIT = 36_782
SOURCE = tuple(BUDGETS)
SUFFIXES = (".py", ".cpp", ".h")
_LAYOUT = (
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
)  # fmt: skip


def code_lines(path: Path) -> int:
    """Return how many lines of a file hold code."""
    text = path.read_text()
    if path.suffix != ".py":
        return sum(bool(line.strip()) and not line.strip().startswith("//") for line in text.splitlines())
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    held: set[int] = set()
    for before, token, after in zip([None, *tokens], tokens, [*tokens[1:], None], strict=False):
        alone = (before is None or before.type in _LAYOUT) and after is not None and after.type == tokenize.NEWLINE
        if token.type not in _LAYOUT and not (token.type == tokenize.STRING and alone):
            held.update(range(token.start[0], token.end[0] + 1))
    return len(held)


def main() -> int:
    root = Path(__file__).parent.parent
    total = 0
    print(f"{'folder':12} {'code':>6} {'budget':>6} {'lines':>6} {'files':>6}  longest, in code")
    for name in (*SOURCE, "tests"):
        files = [p for p in (root / name).rglob("*") if p.suffix in SUFFIXES and "__pycache__" not in p.parts]
        sizes = {p: code_lines(p) for p in files}
        longest = max(sizes, key=sizes.__getitem__)
        lines = sum(len(p.read_text().splitlines()) for p in files)
        code = sum(sizes.values())
        budget = BUDGETS.get(name, "")
        over = "  over its budget" if name in BUDGETS and code > BUDGETS[name] else ""
        print(f"{name:12} {code:6} {budget:>6} {lines:6} {len(files):6}  {longest.name} {sizes[longest]}{over}")
        total += code if name != "tests" else 0
    print(f"{'source':12} {total:6} {LIMIT:>6}")
    return int(total > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
