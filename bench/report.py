"""`seamwise bench report`: the pages bench/results/README.md and CPU.md, made from the files of the benches.

A folder a device, named as the device; in it *.json as `seamwise bench gpu --json` wrote them. Of rows with one key
that of the last file by name counts. A file whose commit is unknown or dirty, or whose shapes are tiny, is refused.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from seamwise.bench.gpu.goals import judge
from seamwise.bench.gpu.rows import Row, read_rows

from .command_line import picture
from .report_cpu import render_cpu
from .roofline import plot_roofline
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


def matching(rows: Rows, pattern: str) -> list[tuple[tuple[str, ...], Row]]:
    """Return measured rows whose key is the pattern, with its groups; times and sizes stand there in ms and GiB too."""
    found = []
    for key, row in rows.items():
        if row["status"] == "ok" and (match := re.fullmatch(pattern, key)):
            numbers = {k: v for k, v in row.items() if isinstance(v, (int, float))}
            larger = {f"{k.removesuffix('us')}ms": v / 1e3 for k, v in numbers.items() if k.endswith("_us")}
            larger |= {f"{k.removesuffix('bytes')}gib": v / 2**30 for k, v in numbers.items() if k.endswith("_bytes")}
            found.append((tuple(match.groups()), row | larger))
    return found


def listed(rows: Rows, pattern: str, names: str, columns: dict[str, str]) -> str:
    """Return the table of the rows that match: the pattern's groups under their names, then columns: name -> format."""
    lines = [(*where, *(form.format_map(row) for form in columns.values())) for where, row in matching(rows, pattern)]
    return table((*names.split(", "), *columns), lines)


def facts(row: Row) -> str:
    shown = {k: v for k, v in row.items() if k not in ("key", "status", "seconds", "failed_tests")}
    return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())


def environment(heads: list[Row], rows: Rows) -> str:
    runs = [(h["file"], h["machine"]["commit"][:12], h["machine"]["torch"], h["machine"]["triton"]) for h in heads]
    return "\n".join(
        (
            f"Device: {facts(rows.get('environment/device', {})) or NOT_MEASURED}\n",
            table(("file", "commit", "torch", "triton"), runs),
            listed(rows, "environment/(copy|read)", "ceiling", {"GB/s (copy: read plus written)": "{gb_per_s:,.0f}"}),
            listed(rows, "environment/(bf16|fp8)", "ceiling", {"TFLOP/s": "{tflop_per_s:,.0f}"}),
        )
    )


def correctness(rows: Rows) -> str:
    lines = [
        (k.removeprefix("correctness/"), r["status"], r.get("error") or r.get("reason") or facts(r))
        for k, r in sorted(rows.items()) if k.startswith("correctness/")
    ]  # fmt: skip
    return table(("check", "", ""), lines)


def kernels(rows: Rows) -> str:
    copy = rows.get("environment/copy", {}).get("gb_per_s")
    shown = Rows()
    for key, row in sorted(rows.items()):
        if row["status"] != "ok" or "provider_us" not in row:
            continue
        other = row["peer_us"] | {n: us for n, us in row["provider_us"].items() if n != row["provider"]}
        best, torch_row = min(other, key=other.__getitem__, default=None), rows.get(f"{key}/torch", {})
        theirs = {f"x_{field}": torch_row.get(field) for field in ("eager_us", "compile_us")}
        shown[key] = row | {k: f"{us / row['us']:.2f}" if us else NOT_MEASURED for k, us in theirs.items()} | {
            "of_copy": f"{100 * row['gb_per_s'] / copy:.0f} %" if copy else NOT_MEASURED,
            "predicted": f"{expected:,.1f}" if (expected := row.get("predicted_us")) else NOT_MEASURED,
            "x_best": f"{other[best] / row['us']:.2f} {best}" if best else "none",
        }  # fmt: skip
    columns = {
        "provider": "{provider}", "us": "{us:,.1f}", "predicted us": "{predicted}", "GB/s": "{gb_per_s:,.0f}",
        "of copy": "{of_copy}", "TFLOP/s": "{tflop_per_s:,.1f}", "x eager": "{x_eager_us}",
        "x torch.compile": "{x_compile_us}", "x best other": "{x_best}",
    }  # fmt: skip
    return listed(shown, "kernels/(.+)", "shape", columns)


def steps(rows: Rows) -> str:
    modes = r"steps/(.+)/(.+)/(graph|piecewise|compiled|eager)/(\d+)"
    columns = {"us a step": "{step_us:,.0f}", "host us": "{host_us:,.0f}", "tokens/s": "{tokens_per_s:,.0f}"}
    worth = Rows()
    for (scheme, batch), row in matching(rows, r"steps/(.+)/without .+/(\d+)"):
        base = rows.get(f"steps/{scheme}/graph/{batch}", {}).get("step_us")
        worth[row["key"]] = row | {"worth": f"{row['step_us'] - base:+,.1f}" if base else NOT_MEASURED}
    captured = {"sizes": "{sizes}", "seconds": "{capture_s:.1f}", "GiB": "{capture_gib:.2f}"}
    return "\n".join(
        (
            listed(rows, modes, "model, scheme, mode, batch", columns),
            "What a pass is worth, in us a step:\n",
            listed(worth, r"steps/(.+)/(.+)/without (.+)/(\d+)", "model, scheme, pass, batch", {"us": "{worth}"}),
            "Capture:\n", listed(rows, "steps/(.+)/(.+)/capture", "model, scheme", captured),
        )
    )  # fmt: skip


def runs(rows: Rows) -> str:
    columns = {
        "output tokens/s": "{tokens_per_s:,.0f}", "decode tokens/s": "{decode_tokens_per_s:,.0f}",
        "first token, s": "{first_token_s:,.3f}",
    }  # fmt: skip
    return listed(rows, r"runs/(.+)/(.+)/(.+)/(\d+)", "model, engine, scheme, batch", columns)


def deepseek(rows: Rows) -> str:
    columns = {
        "compute, ms": "{compute_ms:.1f}", "of it MTP's": "{mtp_ms:.1f}",
        "network (modelled), ms": "{network_ms:.1f}",
        "tokens/s": "{tokens_per_s:,.0f}", "sequences of two batches": "{overlapped_sequences}",
        "their tokens/s": "{overlapped_tokens_per_s:,.0f}", "cache, GiB": "{cache_gib:.1f}",
    }  # fmt: skip
    pattern = r"deepseek/rank/mtp=(\d)/sequences=(\d+)/context=(\d+)"
    steps = listed(rows, pattern, "MTP, sequences, context", columns)
    memory = [(k, f"{v:.2f}") for _, row in matching(rows, "deepseek/memory") for k, v in row.items() if "_gib" in k]
    return f"{steps}\nMemory:\n\n{table(('what', ''), memory)}"


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
        with picture(folder / "breakdown.png", 8, 0.6 * len(parts) + 1.2) as axes:
            left = [0.0] * len(parts)
            for name in ("gemm", "attention", "other"):
                widths = [row[f"{name}_us"] for _, row in parts]
                axes.barh([f"{model}, batch {batch}" for (model, batch), _ in parts], widths, left=left, label=name)
                left = [a + b for a, b in zip(left, widths, strict=True)]
            axes.set(xlabel="us of kernels in a decode step", title="Step breakdown")
            axes.legend(fontsize="small")
        drawn.append(("Step breakdown", "breakdown.png"))
    curves: dict[str, list[tuple[int, float]]] = {}
    for (model, engine, scheme, batch), row in matching(rows, r"runs/(.+)/(.+)/(.+)/(\d+)"):
        curves.setdefault(f"{model}, {engine}, {scheme}", []).append((int(batch), row["tokens_per_s"]))
    if curves:
        with picture(folder / "throughput.png", 8, 5) as axes:
            for name, points in curves.items():
                axes.loglog(*zip(*sorted(points), strict=True), "o-", label=name)
            axes.set(xlabel="batch", ylabel="output tokens/s", title="Throughput")
            axes.legend(fontsize="small")
        drawn.append(("Throughput against batch", "throughput.png"))
    return drawn


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
    cpu_page = options.results / "CPU.md"
    cpu_page.write_text(render_cpu(options.results))
    print(page, cpu_page, sep="\n")
    return 0
