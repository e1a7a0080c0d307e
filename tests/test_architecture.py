"""ARCHITECTURE.md names what is there: functions of its walks, files and folders."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "ARCHITECTURE.md").read_text()
STEPS = re.findall(r"^\| `([\w/]+\.py):([\w.]+)` \|", PAGE, re.MULTILINE)


def definitions(path: Path) -> set[str]:
    """Return the functions and classes of a file, methods as Class.method."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


@pytest.mark.parametrize(("file", "name"), STEPS, ids=":".join)
def test_each_function_of_a_walk_is_where_it_says(file: str, name: str) -> None:
    assert name in definitions(ROOT / file)


def test_the_walks_are_as_short_as_they_say() -> None:
    sizes = [int(n) for n in re.findall(r"^### The walk of a \w+ \((\d+) functions", PAGE, re.MULTILINE)]
    assert len(sizes) == 2 and sum(sizes) == len(STEPS) and max(sizes) <= 16


def test_files_that_the_page_names_exist() -> None:
    # whole paths only; `linear_block.h` and other bare names are said beside their folder
    named = re.findall(r"`?((?:kernels|passes|compile|model_defs|runtime|bench|tests|examples)/[\w/-]+\.\w+)`?", PAGE)
    assert len(named) > 20
    assert [path for path in dict.fromkeys(named) if not (ROOT / path).exists()] == []
