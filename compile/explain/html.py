"""The explanation as one HTML page that needs nothing else: passes, pieces and seams as a picture, misses, code."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from operator import or_
from typing import Any

from seamwise.compile.program import Program

from .text import as_json

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 }
td, th { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums } .bad { color: #b00 } .good { color: #070 }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 13px } summary { cursor: pointer }
.del { background: #fdd } .add { background: #dfd }
"""
_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#9c755f", "#edc948", "#76b7b2", "#ff9da7")


def as_html(program: Program, startup_s: Mapping[str, float], title: str, least_us: Callable[[int, int], float]) -> str:
    """Return the page: its data is exactly `as_json`'s, and the generated program.

    `least_us(bytes, flops)` is the time that the machine's measured ceilings allow: the roofline.
    """
    report = as_json(program, startup_s)
    calls: Counter[str] = reduce(or_, (Counter(each.calls) for each in program.ranges))
    pieces = [
        (name, count, program.loose_ops.get(name, 0), "Inductor" if name in program.packages else "our kernels")
        for name, count in calls.items()
    ]
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{len(program.calls)} pieces, {program.num_distinct} distinct; {program.num_seams} seams with"
        f" {program.num_seam_calls} calls; {len(program.recipes)} weights, {report['derived_weights']} derived.</p>",
        *(
            f"<p>Steps of {r['first']} to {r['last'] or 'any number of'} tokens: {r['pieces']} pieces.</p>"
            for r in report["ranges"]
        ),
        _picture(program, list(calls)),
        "<h2>Passes</h2>",
        _passes(report["passes"]),
        "<h2>Pieces</h2>",
        _table(("piece", "times a step", "loose ops", "run by"), pieces),
        "<h2>Roofline of each piece</h2>",
        _table(
            ("piece", "tokens", "MB", "GFLOP", "least time, µs", "in a step, µs"),
            (
                (name, *_cost(c, count, least_us(c["bytes"], c["flops"])))
                for name, count in calls.items()
                for c in program.piece_costs[name]
            ),
        ),
        "<h2>Kernels</h2>",
        _table(("contract and provider", "calls a step"), report["providers"].items()),
        "<h2>Start-up</h2>",
        _table(("stage", "s"), ((k, round(v, 3)) for k, v in startup_s.items())),
        f"<details><summary>Generated program</summary><pre>{html.escape(program.source)}</pre></details>",
        f"<details><summary>JSON</summary><pre>{html.escape(json.dumps(report, indent=1))}</pre></details>",
    ]
    head = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    return head + "\n".join(sections)


def _cost(cost: Mapping[str, int], calls: int, us: float) -> tuple[int | str, ...]:
    """Return the cells of one piece's cost, of which a call takes `us` at least and a step has so many calls."""
    return cost["tokens"], f"{cost['bytes'] / 1e6:.3f}", f"{cost['flops'] / 1e9:.3f}", f"{us:.1f}", f"{us * calls:.0f}"


def _picture(program: Program, distinct: list[str]) -> str:
    """Draw a step from left to right: a block a piece, coloured by program, a bar a seam."""
    width = max(4, min(28, 980 // max(len(program.calls), 1) - 6))
    blocks, x = [], 0
    for i, name in enumerate(program.calls):
        colour = _COLOURS[distinct.index(name) % len(_COLOURS)]
        shape = f'x="{x}" y="6" width="{width}" height="36" rx="3" fill="{colour}"'
        blocks.append(f"<rect {shape}><title>{name}</title></rect>")
        x += width + 2
        if i < program.num_seams:
            blocks.append(f'<rect x="{x}" y="0" width="3" height="48" fill="#222"><title>seam {i + 1}</title></rect>')
            x += 5
    drawn = f'<svg width="{x}" height="48" role="img" aria-label="pieces and seams of a step">{"".join(blocks)}</svg>'
    return f"<p>{drawn}<br>A block is a piece, equal colours are one program; a dark bar is a seam.</p>"


def _passes(passes: Iterable[Mapping[str, Any]]) -> str:
    rows = []
    for entry in passes:
        expected = entry["expected"]
        kept = expected is None or entry["matched"] >= expected
        certificate = entry["certificate"]
        sound = "" if certificate is None else f"error {certificate['max_error']:.0e}"
        if certificate is not None and certificate["lossy"]:
            sound = f"rounds on purpose, {sound}"
        reasons = [f"{m['module'] or '(top level)'}, {m['node']}: {m['reason']}" for m in entry["misses"]]
        listed = "".join(f"<li>{html.escape(reason)}</li>" for reason in reasons)
        detail = f"<details><summary>{len(reasons)} missed</summary><ul>{listed}</ul></details>" if reasons else ""
        if entry["diff"]:
            detail += f"<details><summary>before, after</summary><pre>{_diff(entry['diff'])}</pre></details>"
        rows.append(
            f"<tr><td>{entry['name']}</td><td class='n {'good' if kept else 'bad'}'>{entry['matched']}</td>"
            f"<td class=n>{'' if expected is None else expected}</td><td class=n>{entry['elapsed_ms']}</td>"
            f"<td>{sound}</td><td>{detail}</td></tr>"
        )
    names = ("pass", "matched", "promised", "ms", "validated", "")
    return f"<table><tr>{''.join(f'<th>{n}</th>' for n in names)}</tr>{''.join(rows)}</table>"


def _diff(lines: Iterable[str]) -> str:
    kind = {"-": "del", "+": "add"}
    return "\n".join(f"<span class='{kind.get(line[:1], '')}'>{html.escape(line)}</span>" for line in lines)


def _table(names: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = "".join(f"<th>{html.escape(n)}</th>" for n in names)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
