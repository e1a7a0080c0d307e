"""Seamwise beside its peers in one run: each engine in processes of its own, one after the other, same prompts.

Seamwise runs first and last, so that a machine that slows down or speeds up on the way shows. Ratios are what counts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .command_line import picture
from .engine_process import ENGINES
from .machine import label
from .workloads import WORKLOADS

PEERS = [name for name in ENGINES if name != "seamwise"]
# Row of the table: workload, figure, what it is called, and whether more is better.
ROWS = [
    ("single", "decode_tokens_per_s", "single stream, decode tok/s", True),
    ("single", "ttft_ms", "time to first token, 128 prompt tokens, ms", False),
    ("batch", "output_tokens_per_s", "batch 32 x (128+128), output tok/s", True),
    ("prefill", "prompt_tokens_per_s", "prefill 8 x 512, prompt tok/s", True),
    ("prefix", "output_tokens_per_s", "shared prefix 16 x (448+64)+32, output tok/s", True),
    ("start", "cold_s", "start to first token, cold, s", False),
    ("start", "warm_s", "start to first token, warm, s", False),
    ("start", "peak_mib", "peak memory in single stream, MiB", False),
]


def preloads(python: str) -> list[str]:
    """Return the libraries with which vLLM's documentation asks to start it on a CPU, where they are installed.

    Source: https://docs.vllm.ai/en/latest/getting_started/installation/cpu.html.
    """
    places = [*Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"), *Path(python).parent.parent.glob("lib/libiomp5.so")]
    return [str(p) for p in places]


def run_engine(job: Mapping[str, Any], *, python: str, preload: Sequence[str], home: Path | None) -> dict[str, Any]:
    """Run one engine process and return its report. With `home`, caches are looked for there.

    Raises RuntimeError with the end of the process's output when it fails.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "HF_HUB_OFFLINE": "1"}
    if job["instruction_set"] == "avx2":  # torch's and oneDNN's own kernels are held to it too
        environment |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    if preload:
        environment["LD_PRELOAD"] = ":".join(preload)
    if home is not None:
        environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home), "TORCHINDUCTOR_CACHE_DIR": str(home / "ind")}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(dict(job), file)
        file.flush()
        # -P: with this folder on sys.path, transformers would take our kernels.py for the Hub's package of that name.
        command = [python, "-P", str(Path(__file__).with_name("engine_process.py")), file.name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd="/")
    if done.returncode:
        raise RuntimeError(f"{job['engine']} failed: {(done.stdout + done.stderr)[-2000:]}")
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return report


def add_peer_options(parser: argparse.ArgumentParser) -> None:
    """Add --compare, --peer-python and --peer-model."""
    parser.add_argument(
        "--compare", default="", metavar="PEERS", help=f"{','.join(PEERS)}: run these beside Seamwise on the CPU"
    )
    parser.add_argument(
        "--peer-python", action="append", default=[], metavar="PEER=PATH", help="the interpreter that has a peer"
    )
    parser.add_argument(
        "--peer-model", action="append", default=[], metavar="PEER=PATH", help="a peer's model, where another"
    )


def chosen_peers(options: argparse.Namespace) -> tuple[dict[str, str], dict[str, str]]:
    """Return the interpreter of each peer of --compare, and the models of those that have one of their own.

    Raises ValueError for a peer that there is none of, and for an interpreter or a model of one that is not compared.
    """
    pythons, models = (dict(p.partition("=")[::2] for p in g) for g in (options.peer_python, options.peer_model))
    peers = {name: pythons.get(name, sys.executable) for name in filter(None, options.compare.split(","))}
    if unknown := set(peers) - {*PEERS}:
        raise ValueError(f"--compare: no peer {sorted(unknown)[0]!r}; there are: {', '.join(PEERS)}")
    if unknown := {*pythons, *models} - {*peers}:
        raise ValueError(f"--peer-python, --peer-model: {sorted(unknown)[0]!r} is not compared with")
    return peers, models


def available(engine: str, python: str, model: str) -> str | None:
    """Return why a peer cannot be run by this interpreter on this model, or None."""
    if engine == "llama_cpp" and not model.endswith(".gguf"):
        return f"it reads .gguf files, not {model}; name one: --peer-model llama_cpp=FILE"
    if python != sys.executable:
        return None if Path(python).exists() else f"no interpreter at {python}"
    return None if importlib.util.find_spec(engine) else f"{engine} is not installed"


def compare(
    model: str, peers: Mapping[str, str], *, models: Mapping[str, str], workloads: Sequence[str], vocab_size: int,
    settings: Mapping[str, Any], startup: bool,
) -> dict[str, Any]:  # fmt: skip
    """Run Seamwise, the peers ({engine: interpreter}) and Seamwise again; `models` are those of peers with another.

    Returns {"figures": {engine: {workload: {figure: median}}}, "absent": {engine: reason}, "runs": all reports}.
    """
    drawn = {name: WORKLOADS[name].job(vocab_size, settings["repeats"] + 1) for name in workloads}
    absent = {name: why for name, python in peers.items() if (why := available(name, python, models.get(name, model)))}
    present = {name: python for name, python in peers.items() if name not in absent}
    reports: dict[str, list[dict[str, Any]]] = {}
    for engine, python in [("seamwise", sys.executable), *present.items(), ("seamwise", sys.executable)]:
        given = {"engine": engine, "model": models.get(engine, model), "workloads": drawn, **settings}
        how: dict[str, Any] = {"python": python, "preload": preloads(python) if engine == "vllm" else []}
        try:
            reports[engine] = reports.get(engine, []) + _measure(given, how, startup and engine not in reports)
        except RuntimeError as error:  # a peer that fails costs none of what the others were measured at
            if engine == "seamwise":
                raise
            absent[engine] = str(error)
    return {"figures": {e: medians(r) for e, r in reports.items()}, "absent": absent, "runs": reports}


def _measure(given: Mapping[str, Any], how: Mapping[str, Any], startup: bool) -> list[dict[str, Any]]:
    """Return one engine's reports: of its start, where asked, and of its workloads."""
    reports: list[dict[str, Any]] = []
    if startup:
        with tempfile.TemporaryDirectory() as home:
            begin = {**given, "workloads": {}}
            single = {k: v for k, v in given["workloads"].items() if k == "single"}
            cold = run_engine(begin, **how, home=Path(home))["start_s"]
            warm = [run_engine(begin | {"workloads": single}, **how, home=Path(home)) for _ in range(2)]
        start = {"cold_s": cold, "warm_s": min(w["start_s"] for w in warm), "peak_mib": warm[0]["peak_mib"]}
        reports.append({"results": {"start": [start]}})
    return [*reports, run_engine(given, **how, home=None)]


def medians(reports: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the median of every figure over all runs of one engine."""
    pooled: dict[str, dict[str, list[float]]] = {}
    for report in reports:
        for workload, runs in report["results"].items():
            for run in runs:
                for figure, value in run.items():
                    pooled.setdefault(workload, {}).setdefault(figure, []).append(value)
    return {w: {f: statistics.median(v) for f, v in figures.items()} for w, figures in pooled.items()}


def table(figures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[dict[str, Any]]:
    """Return the rows that were measured: value of each engine, and Seamwise's ratio to each peer (above 1: better)."""
    rows = []
    for workload, figure, what, more in ROWS:
        values = {e: f[workload][figure] for e, f in figures.items() if figure in f.get(workload, {})}
        if "seamwise" in values:
            ours = values["seamwise"]
            ratios = {e: ours / v if more else v / ours for e, v in values.items() if e != "seamwise"}
            rows.append({"what": what, "values": values, "ratios": ratios})
    return rows


def print_table(rows: Sequence[Mapping[str, Any]], absent: Mapping[str, str]) -> None:
    """Print the table, one workload a line."""
    for row in rows:
        values = "  ".join(f"{engine} {value:,.1f}" for engine, value in row["values"].items())
        ratios = "  ".join(f"{ratio:.2f} x {engine}" for engine, ratio in row["ratios"].items())
        print(f"{label()} {row['what']:46} {values}   {ratios}")
    for engine, why in absent.items():
        print(f"{engine}: not measured, {why}")


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the ratios to each peer as bars (PNG). Raises RuntimeError without matplotlib."""
    engines = sorted({engine for row in rows for engine in row["ratios"]})
    if not engines:
        raise ValueError("nothing to draw: no peer was measured")
    with picture(path, 9, 0.9 * len(rows) + 1) as axes:
        for i, engine in enumerate(engines):
            places = [y + 0.8 * i / len(engines) for y in range(len(rows))]
            widths = [r["ratios"].get(engine, 0) for r in rows]
            bars = axes.barh(places, widths, 0.8 / len(engines), label=f"against {engine}")
            axes.bar_label(bars, fmt="%.2f", fontsize="small")
        axes.set_yticks(range(len(rows)), [r["what"] for r in rows])
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlabel("times better than the peer, in the same run")
        axes.invert_yaxis()
        axes.legend()
