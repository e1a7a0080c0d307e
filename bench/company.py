"""`seamwise bench company`: decode beside other busy processes. Each is a loop that never sleeps, on any core.

Goal: with one of two cores taken, at least 45 % of what is reached alone. An engine is measured alone and with each
number of neighbours, in turns, in processes of its own.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .command_line import command_line, parse, save
from .compare import add_peer_options, available, chosen_peers, preloads, run_engine
from .machine import label
from .workloads import WORKLOADS


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Keep `count` processes busy within the context."""
    busy = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measure(job: Mapping[str, Any], python: str, counts: list[int], rounds: int) -> dict[int, float]:
    """Return the median decode tokens/s of an engine for each number of neighbours."""
    preload = preloads(python) if job["engine"] == "vllm" else []
    found: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(rounds):
        for count in counts:
            with neighbours(count):
                report = run_engine(job, python=python, preload=preload, home=None)
            found[count] += [run["decode_tokens_per_s"] for run in report["results"]["single"]]
    return {count: statistics.median(values) for count, values in found.items()}


def main(arguments: list[str]) -> int:
    """Parse arguments, measure, print a line an engine and number of neighbours, write JSON when asked."""
    from seamwise.runtime.build.model_config import ModelConfig
    from seamwise.runtime.weights.hub import resolve_model

    parser = command_line("company", __doc__)
    parser.add_argument(
        "--neighbours", default="0,1,2", help="numbers of busy processes; the first is what ratios are to"
    )
    parser.add_argument("--tokens", type=int, default=64, help="decoded tokens of a run")
    parser.add_argument("--rounds", type=int, default=3)
    add_peer_options(parser)
    options = parse(parser, arguments)
    directory = resolve_model(options.model)
    peers, models = chosen_peers(options)
    counts = [int(n) for n in options.neighbours.split(",")]
    vocab_size = ModelConfig.from_directory(directory).vocab_size
    workload = replace(WORKLOADS["single"], output_tokens=options.tokens).job(vocab_size, 2)
    rows: dict[str, dict[int, float]] = {}
    for engine, python in {"seamwise": sys.executable, **peers}.items():
        model = models.get(engine, str(directory))
        if engine != "seamwise" and (why := available(engine, python, model)):
            raise ValueError(f"--compare {engine}: {why}")
        job = {
            "engine": engine, "model": model, "dtype": "bfloat16", "quantization": None, "max_model_len": 1024,
            "threads": torch.get_num_threads(), "instruction_set": options.instruction_set,
            "workloads": {"single": workload},
        }  # fmt: skip
        rows[engine] = measure(job, python, counts, options.rounds)
        for count, rate in rows[engine].items():
            share = 100 * rate / rows[engine][counts[0]]
            print(f"{label()} {engine:14} {count} busy neighbours: {rate:7.1f} tokens/s, {share:3.0f} %", flush=True)
    save(options, model=Path(options.model).name, decode_tokens_per_s=rows)
    return 0
