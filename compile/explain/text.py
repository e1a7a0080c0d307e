"""Say what the compiler did: each pass with its count, promise and misses; pieces and seams; the cost of start-up."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from seamwise.compile.program import Program, TokenRange


def as_json(program: Program, startup_s: Mapping[str, float]) -> dict[str, Any]:
    """Return the report as plain data; `expected` is null for a pass that promises no count."""
    return {
        "passes": [asdict(r) | {"elapsed_ms": round(r.elapsed_ms, 1)} for r in program.reports],
        "ranges": [
            {"first": first, "last": last, "pieces": len(each.calls), "collectives": each.collectives}
            for first, last, each in _ranges(program)
        ],
        "pieces": {
            "total": len(program.calls),
            "distinct": program.num_distinct,
            "calls": dict(Counter(program.calls)),
            "costs": program.piece_costs,
        },
        "seams": program.num_seams,
        "providers": program.providers,
        "collectives": program.collectives,
        "weight_bytes": program.weight_bytes,
        "kv_bytes_per_token": program.kv_bytes,
        "taken_bytes_per_token": sum(_bytes_of(value) for value in program.carried),
        "derived_weights": sum("op" in recipe for recipe in program.recipes.values()),
        "startup_s": dict(startup_s),
    }


def as_text(program: Program, startup_s: Mapping[str, float]) -> str:
    """Return the report for a terminal."""
    lines = [f"{'pass':22} {'matched':>8} {'promised':>9} {'ms':>7}"]
    for r in program.reports:
        promised = "-" if r.expected is None else str(r.expected)
        word = "rounds on purpose" if r.certificate and r.certificate["lossy"] else "validated"
        sound = f"  {word}, error {r.certificate['max_error']:.0e}" if r.certificate else ""
        fewer = "  fewer than promised" if r.expected is not None and r.matched < r.expected else ""
        larger = f"  in steps from {r.from_tokens} tokens on" if r.from_tokens > 1 else ""
        lines.append(f"{r.name:22} {r.matched:8} {promised:>9} {r.elapsed_ms:7.1f}{fewer}{sound}{larger}")
        lines += [f"    missed {miss}" for miss in r.misses]
    lines.append(f"\npieces: {len(program.calls)}, distinct: {program.num_distinct}")
    lines.append(f"seams: {program.num_seams}, with {program.num_seam_calls} calls")
    for first, last, each in _ranges(program):
        lines.append(f"steps of {first} to {last or 'any number of'} tokens: {len(each.calls)} pieces")
        lines += [f"    {_collective(c)}" for c in each.collectives]
    for name, count in Counter(program.calls).items():
        how = "compiled by Inductor" if name in program.packages else "kernels called by generated code"
        lines.append(f"    {name} runs {count} times a step, {program.loose_ops[name]} loose ops, {how}")
        lines += [f"        {_cost(c)}" for c in program.piece_costs.get(name, ())]
    derived = sum("op" in recipe for recipe in program.recipes.values())
    lines.append(f"weights: {len(program.recipes)}, of them derived: {derived}")
    lines.append(
        f"memory of a rank: {program.weight_bytes / 1e6:.1f} MB of weights, {program.kv_bytes} B a cached token"
    )
    lines.append("providers:")
    lines += [f"    {name:28} {count:4} calls a step" for name, count in program.providers.items()]
    lines.append("start-up:")
    lines += [f"    {stage:20} {seconds:7.2f} s" for stage, seconds in startup_s.items()]
    return "\n".join(lines)


def _bytes_of(value: Mapping[str, Any]) -> int:
    """Return the bytes of one token's part of a value that a stage takes from the one before."""
    size: int = getattr(torch, value["dtype"]).itemsize
    return size * math.prod(n for n in value["shape"] if n is not None)


def _ranges(program: Program) -> list[tuple[int, int | None, TokenRange]]:
    """Return each range's first and last number of tokens; the last range has no last."""
    lasts = [each.first - 1 for each in program.ranges[1:]]
    return [(each.first, last, each) for each, last in zip(program.ranges, [*lasts, None], strict=True)]


def balance_text(found: Mapping[str, int]) -> str:
    """Return what `balance_of` found, for a terminal."""
    return (
        f"experts move: {found['experts']} at {found['places']} places in each of {found['layers']} layers, one layer"
        f" between two steps, {found['expert_bytes']} B each; a row there and back is {found['row_bytes']} B\n"
        f"    a layer's table of {found['table_bytes']} B is on every rank, read by place_experts before each dispatch"
    )


def _collective(sent: Mapping[str, Any]) -> str:
    meanwhile = f", meanwhile {' '.join(sent['meanwhile'])}" if "meanwhile" in sent else ""
    return f"{sent['op']:36} {sent['calls']:4} calls, {sent['row_bytes']} B a row{meanwhile}"


def _cost(cost: Mapping[str, int]) -> str:
    return f"{cost['tokens']:4} tokens: at least {cost['bytes'] / 1e6:.2f} MB, {cost['flops'] / 1e9:.3f} GFLOP"
