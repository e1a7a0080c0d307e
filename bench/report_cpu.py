"""The page bench/results/CPU.md, made by `seamwise bench report` from the files cpu-*.json beside it.

Each is what a bench wrote with --json: a machine, what was asked for, and figures in one of three shapes: `table`
(engines beside each other), `results` (figures, or figures of each name) or `rows` (a line each). A picture of the same
name is shown under its table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HEAD = """# Measurements on CPUs

Made by `seamwise bench report` from the files beside it, each written by the bench it is named after. The figures of
one file are from one run on one machine; other files are from other days: ratios within a file are what counts.
"""


def render_cpu(folder: Path) -> str:
    """Return the page of a results folder. Raises ValueError for a file without figures."""
    page = [HEAD]
    for path in sorted(folder.glob("cpu-*.json")):
        data = json.loads(path.read_text())
        page.append(f"## {path.stem.removeprefix('cpu-')}\n")
        page.append(_facts(data))
        page.append(_figures(data, path))
        if path.with_suffix(".png").exists():
            page.append(f"![{path.stem}]({path.stem}.png)\n")
    return "\n".join(page)


def _facts(data: Mapping[str, Any]) -> str:
    """Return the machine and what was asked for, a line each."""
    machine = data["machine"]
    asked = {k: v for k, v in data.items() if isinstance(v, (str, int, float))} | data.get(
        "shape", data.get("load", {})
    )
    lines = [", ".join(f"{key} {value}" for key, value in what.items()) for what in (machine, asked) if what]
    return "\n\n".join(lines) + "\n"


def _figures(data: Mapping[str, Any], path: Path) -> str:
    if "table" in data:  # what `bench throughput --compare` writes
        engines = list(data["figures"])
        header = ["", *engines, *(f"against {engine}" for engine in engines if engine != "seamwise")]
        lines = [
            [
                row["what"],
                *(row["values"].get(e) for e in engines),
                *(f"{ratio:.2f} x" for ratio in row["ratios"].values()),
            ]
            for row in data["table"]
        ]
    elif "results" in data:
        named = {k: v for k, v in data["results"].items() if isinstance(v, dict)}
        alone = {k: v for k, v in data["results"].items() if not isinstance(v, (dict, list))}
        columns = named or {"": alone}
        figures = list(dict.fromkeys(figure for column in columns.values() for figure in column))
        header = ["", *columns]
        lines = [[figure, *(column.get(figure) for column in columns.values())] for figure in figures]
    elif "rows" in data:
        header = [k for k, v in data["rows"][0].items() if isinstance(v, (str, int, float))]
        lines = [[row[name] for name in header] for row in data["rows"]]
    else:
        raise ValueError(f"{path}: no figures; wanted 'table', 'results' or 'rows'")
    return _table(header, lines)


def _table(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    cells = [[_word(value) for value in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(header), ["---"] * len(header), *cells]) + "\n"


def _word(value: Any) -> str:
    """Return a value to four digits; nothing for one that was not measured."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
