"""`seamwise bench report`: the page bench/results/README.md and its pictures, made from the files of `bench gpu`.

A folder a device, named as the device; in it *.json as `seamwise bench gpu --json` wrote them. Of rows with one key
that of the last file by name counts. A file whose commit is unknown or dirty, or whose shapes are tiny, is refused.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .gpu_goals import NotMeasured, judge, need
from .gpu_rows import Row, read_rows
from .roofline import plot_roofline, pyplot
from .timing import Ceilings

FOLDER = Path(__file__).parent / "results"
NOT_MEASURED = "not measured"
Rows = dict[str, Row]

HEAD = """# Measurements on GPUs

Made by `seamwise bench report` from the files beside it, which `seamwise bench gpu --json FILE` writes. Every number is
that of a run: {none} stands where there was none. Medians; caches cold for kernels; goals are those of the project.
"""


def load(folder: Path) -> tuple[list[Row], Rows]:
    """Return the heads and the rows of a device's files, by name. Raises ValueError for a file to be refused."""
    heads, rows = [], Rows()
    for path in sorted(folder.glob("*.json"), key=lambda p: p.name):
        if path.name.startswith("tuned-"):
            continue
        head, found = read_rows(path)
        commit = head["machine"].get("commit", "unknown")
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise ValueError(f"{path}: commit is {commit!r}, wanted a run of a committed tree; measure again")
        if head["shapes"] != "real":
            raise ValueError(f"{path}: its shapes are {head['shapes']!r}, wanted a run with real ones")
        heads.append(head | {"file": path.name})
        rows |= {key: row for key, row in found.items() if row["status"] == "ok" or key not in rows}
    return heads, rows


def table(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table, or "not measured" without lines."""
    body = [f"| {' | '.join(map(str, line))} |" for line in lines]
    if not body:
        return f"{NOT_MEASURED}\n"
    return "\n".join([f"| {' | '.join(header)} |", "|---" * len(header) + "|", *body]) + "\n"


def number(rows: Rows, key: str, field: str, digits: int = 0, scale: float = 1.0) -> str:
    """Return a measured number as text, or "not measured"."""
    try:
        return f"{need(rows, key)[field] * scale:,.{digits}f}"
    except NotMeasured:
        return NOT_MEASURED


def matching(rows: Rows, pattern: str) -> list[tuple[tuple[str, ...], Row]]:
    """Return measured rows whose key is the pattern, with its groups."""
    found = [(m.groups(), r) for k, r in rows.items() if r["status"] == "ok" and (m := re.fullmatch(pattern, k))]
    return [(tuple(str(g) for g in groups), row) for groups, row in found]


def environment(heads: list[Row], rows: Rows) -> str:
    runs = [(h["file"], h["machine"]["commit"][:12], h["machine"]["torch"], h["machine"]["triton"]) for h in heads]
    state = rows.get("environment/device", {})
    hidden = ("key", "status", "seconds")
    listed = ", ".join(f"{k} {v}" for k, v in state.items() if k not in hidden) or NOT_MEASURED
    ceilings = [
        ("copy, read plus written, GB/s", number(rows, "environment/copy", "gb_per_s")),
        ("read, GB/s", number(rows, "environment/read", "gb_per_s")),
        ("bf16 matmul, TFLOP/s", number(rows, "environment/bf16", "tflop_per_s")),
        ("fp8 matmul, TFLOP/s", number(rows, "environment/fp8", "tflop_per_s")),
    ]
    files = table(("file", "commit", "torch", "triton"), runs)
    return f"Device: {listed}\n\n{files}\n{table(('ceiling', ''), ceilings)}"


def correctness(rows: Rows) -> str:
    lines = [
        (k.removeprefix("correctness/"), r["status"], r.get("error") or r.get("reason") or _facts(r))
        for k, r in sorted(rows.items()) if k.startswith("correctness/")
    ]  # fmt: skip
    return table(("check", "", ""), lines)


def _facts(row: Row) -> str:
    return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k not in _HEADS)


_HEADS = ("key", "status", "seconds", "failed_tests")


def kernels(rows: Rows) -> str:
    copy = rows.get("environment/copy", {}).get("gb_per_s")
    lines = []
    for key, row in sorted(rows.items()):
        if row["status"] != "ok" or "provider_us" not in row:
            continue
        other = row["peer_us"] | {n: us for n, us in row["provider_us"].items() if n != row["provider"]}
        best = min(other, key=other.__getitem__, default=None)
        torch_row = rows.get(f"{key}/torch", {})
        theirs = [torch_row.get(field) for field in ("eager_us", "compile_us")]
        ratios = [f"{us / row['us']:.2f}" if us else NOT_MEASURED for us in theirs]
        lines.append(
            (
                key.removeprefix("kernels/"), row["provider"], f"{row['us']:,.1f}", f"{row['gb_per_s']:,.0f}",
                f"{100 * row['gb_per_s'] / copy:.0f} %" if copy else NOT_MEASURED, f"{row['tflop_per_s']:,.1f}",
                *ratios, f"{other[best] / row['us']:.2f} {best}" if best else "none",
            )
        )  # fmt: skip
    return table(
        ("shape", "provider", "us", "GB/s", "of copy", "TFLOP/s", "x eager", "x torch.compile", "x best other"), lines
    )


def steps(rows: Rows) -> str:
    lines = [
        (*where, f"{r['step_us']:,.0f}", f"{r['host_us']:,.0f}", f"{r['tokens_per_s']:,.0f}")
        for where, r in matching(rows, r"steps/(.+)/(.+)/(graph|compiled|eager)/(\d+)")
    ]
    worth = []
    for (model, scheme, name, batch), row in matching(rows, r"steps/(.+)/(.+)/without (.+)/(\d+)"):
        base = rows.get(f"steps/{model}/{scheme}/graph/{batch}", {}).get("step_us")
        worth.append((model, scheme, name, batch, f"{row['step_us'] - base:+,.1f}" if base else NOT_MEASURED))
    captured = [
        (*where, r["sizes"], f"{r['capture_s']:.1f}", f"{r['capture_bytes'] / 2**30:.2f}")
        for where, r in matching(rows, r"steps/(.+)/(.+)/capture")
    ]
    return "\n".join(
        (
            table(("model", "scheme", "mode", "batch", "us a step", "host us", "tokens/s"), lines),
            "What a pass is worth, in us a step:\n", table(("model", "scheme", "pass", "batch", "us"), worth),
            "Capture:\n", table(("model", "scheme", "sizes", "seconds", "GiB"), captured),
        )
    )  # fmt: skip


def runs(rows: Rows) -> str:
    lines = [
        (*where, f"{r['tokens_per_s']:,.0f}", f"{r['decode_tokens_per_s']:,.0f}", f"{1e3 * r['first_token_s']:,.0f}")
        for where, r in matching(rows, r"runs/(.+)/(.+)/(.+)/(\d+)")
    ]
    return table(("model", "engine", "scheme", "batch", "output tokens/s", "decode tokens/s", "first token, ms"), lines)


def deepseek(rows: Rows) -> str:
    lines = [
        (
            *where, f"{r['compute_us'] / 1e3:.1f}", f"{r['network_us'] / 1e3:.1f}", f"{r['tokens_per_s']:,.0f}",
            r["overlapped_sequences"], f"{r['overlapped_tokens_per_s']:,.0f}", f"{r['cache_bytes'] / 2**30:.1f}",
        )
        for where, r in matching(rows, r"deepseek/rank/mtp=(\d)/sequences=(\d+)/context=(\d+)")
    ]  # fmt: skip
    memory = rows.get("deepseek/memory", {})
    ledger = [(k.removesuffix("_bytes"), f"{v / 2**30:.2f}") for k, v in memory.items() if k.endswith("_bytes")]
    header = (
        "MTP", "sequences", "context", "compute, ms", "network (modelled), ms", "tokens/s", "two batches", "tokens/s",
        "cache, GiB",
    )  # fmt: skip
    return f"{table(header, lines)}\nMemory:\n\n{table(('what', 'GiB'), ledger)}"


def pictures(rows: Rows, folder: Path) -> list[tuple[str, str]]:
    """Draw what was measured; return (title, file) of each picture, in `folder`."""
    drawn = []
    found = [r for r in rows.values() if r["status"] == "ok" and "provider_us" in r and r["flops"]]
    if found and all(rows.get(f"environment/{n}", {}).get("status") == "ok" for n in ("copy", "bf16")):
        peak = {"bfloat16": rows["environment/bf16"]["tflop_per_s"]}
        ceilings = Ceilings(copy_gb_per_s=rows["environment/copy"]["gb_per_s"], matmul_tflop_per_s=peak)
        plot_roofline(found, ceilings, "bfloat16", folder / "roofline.png")
        drawn.append(("Roofline", "roofline.png"))
    parts = matching(rows, r"steps/(.+)/breakdown/(\d+)")
    if parts:
        figure, axes = pyplot().subplots(figsize=(8, 0.6 * len(parts) + 1.2))
        left = [0.0] * len(parts)
        for name in ("gemm", "attention", "other"):
            widths = [row[f"{name}_us"] for _, row in parts]
            axes.barh([f"{model}, batch {batch}" for (model, batch), _ in parts], widths, left=left, label=name)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set(xlabel="us of kernels in a decode step", title="Step breakdown")
        drawn.append(_save(figure, axes, "Step breakdown", folder / "breakdown.png"))
    curves: dict[str, list[tuple[int, float]]] = {}
    for (model, engine, scheme, batch), row in matching(rows, r"runs/(.+)/(.+)/(.+)/(\d+)"):
        curves.setdefault(f"{model}, {engine}, {scheme}", []).append((int(batch), row["tokens_per_s"]))
    if curves:
        figure, axes = pyplot().subplots(figsize=(8, 5))
        for name, points in curves.items():
            axes.loglog(*zip(*sorted(points), strict=True), "o-", label=name)
        axes.set(xlabel="batch", ylabel="output tokens/s", title="Throughput")
        drawn.append(_save(figure, axes, "Throughput against batch", folder / "throughput.png"))
    return drawn


def _save(figure: Any, axes: Any, title: str, path: Path) -> tuple[str, str]:
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return title, path.name


SECTIONS: dict[str, Callable[[Rows], str]] = {
    "Correctness on the device": correctness, "Kernels": kernels, "Decode steps": steps, "Whole runs": runs,
    "DeepSeek-R1, one rank": deepseek,
}  # fmt: skip


def render(folder: Path) -> str:
    """Return the page of a results folder, and draw its pictures."""
    page = [HEAD.format(none=f'"{NOT_MEASURED}"')]
    devices: list[Path | None] = [*sorted(p for p in folder.iterdir() if p.is_dir())]
    for device in devices or [None]:
        heads, rows = load(device) if device else ([], {})
        page.append(f"## {device.name if device else 'No device yet'}\n")
        goals = [(o.goal, o.word, "" if o.met is None and not rows else o.reason) for o in judge(rows)]
        page += ["### Goals\n", table(("goal", "", "why"), goals), "### Environment\n", environment(heads, rows)]
        for title, section in SECTIONS.items():
            page += [f"### {title}\n", section(rows)]
        if device:
            page += [f"![{title}]({device.name}/{name})\n" for title, name in pictures(rows, device)]
    return "\n".join(page)


def main(arguments: list[str]) -> int:
    """Write the page and its pictures."""
    parser = argparse.ArgumentParser(prog="seamwise bench report", description=__doc__)
    parser.add_argument("--results", type=Path, default=FOLDER, help=f"the results folder (default {FOLDER})")
    options = parser.parse_args(arguments)
    if not options.results.is_dir():
        raise ValueError(f"--results {options.results}: no such folder; run it in a source tree, or name the folder")
    page = options.results / "README.md"
    page.write_text(render(options.results))
    print(page)
    return 0
