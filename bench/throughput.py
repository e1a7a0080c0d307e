"""`seamwise bench throughput`: the fixed workloads through `LLM`, alone or beside peers, as text, JSON and plot."""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from .command_line import command_line, parse, save
from .compare import compare, plot, print_table, table
from .engine_process import ENGINES, greedy, measure
from .machine import label
from .workloads import WORKLOADS

PEERS = [name for name in ENGINES if name != "seamwise"]


def alone(options: argparse.Namespace, names: list[str]) -> list[dict[str, Any]]:
    """Run the workloads in this process: the medians, and every run's figures."""
    from seamwise import LLM, SamplingParams

    llm = LLM(
        options.model, dtype=options.dtype, device=options.device, entry=options.entry,
        enforce_eager=options.enforce_eager, max_model_len=options.max_model_len, max_num_seqs=64,
        load_format=options.load_format, quantization=options.quantization,
    )  # fmt: skip
    vocab_size, device = llm.engine.runner.config.vocab_size, llm.engine.runner.options.device

    generate, results = greedy(llm, SamplingParams), []
    for name in names:
        drawn = [WORKLOADS[name].prompts(vocab_size, seed) for seed in range(options.repeats + 1)]
        runs = measure(generate, WORKLOADS[name].output_tokens, drawn)
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        results.append({"workload": name, **medians, "runs": runs})
        print(f"{label(device)} {name:8} {'  '.join(f'{k} {v:,.1f}' for k, v in medians.items())}")
    return results


def beside(options: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Run the workloads in Seamwise and in peers, a process each; print the table."""
    from seamwise.runtime.build.model_config import ModelConfig
    from seamwise.runtime.weights.hub import resolve_model

    directory = resolve_model(options.model)
    pythons, models = (dict(p.partition("=")[::2] for p in g) for g in (options.peer_python, options.peer_model))
    peers = {name: pythons.get(name, sys.executable) for name in options.compare.split(",")}
    if unknown := set(peers) - {*PEERS}:
        raise ValueError(f"--compare: no peer {sorted(unknown)[0]!r}; there are: {', '.join(PEERS)}")
    if unknown := {*pythons, *models} - {*peers}:
        raise ValueError(f"--peer-python, --peer-model: {sorted(unknown)[0]!r} is not compared with")
    settings = {
        "dtype": "bfloat16" if options.dtype == "auto" else options.dtype, "threads": torch.get_num_threads(),
        "max_model_len": options.max_model_len, "repeats": options.repeats, "quantization": options.quantization,
        "instruction_set": options.instruction_set,
    }  # fmt: skip
    vocab_size = ModelConfig.from_directory(directory).vocab_size
    report = compare(
        str(directory), peers, models=models, workloads=names, vocab_size=vocab_size, settings=settings,
        startup=options.startup,
    )  # fmt: skip
    report["table"] = table(report["figures"])
    print_table(report["table"], report["absent"])
    if options.plot:
        plot(report["table"], options.plot)
    return report


def main(arguments: list[str]) -> int:
    """Parse arguments, run, print one line a workload and write JSON when asked."""
    parser = command_line("throughput", __doc__, plot="with --compare: the ratios as a picture")
    parser.add_argument("--workload", choices=[*WORKLOADS, "all"], default="all")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--entry", default="auto", choices=["auto", "own", "transformers"])
    parser.add_argument("--quantization", help="Seamwise's: as LLM takes it")
    parser.add_argument("--load-format", default="auto", help="dummy: seeded random weights")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--compare", metavar="PEERS", help=f"{','.join(PEERS)}: run these beside Seamwise on the CPU")
    parser.add_argument(
        "--peer-python", action="append", default=[], metavar="PEER=PATH", help="the interpreter that has a peer"
    )
    parser.add_argument(
        "--peer-model", action="append", default=[], metavar="PEER=PATH", help="a peer's model, where another"
    )
    parser.add_argument("--startup", action="store_true", help="with --compare: also cold and warm start, peak memory")
    options = parse(parser, arguments)
    names = list(WORKLOADS) if options.workload == "all" else [options.workload]
    if options.compare:
        if options.device not in ("auto", "cpu") or options.entry != "auto" or options.enforce_eager:
            raise ValueError("--compare runs on the CPU with defaults: leave out --device, --entry and --enforce-eager")
        report = beside(options, names)
    elif options.plot or options.startup or options.peer_python or options.peer_model:
        raise ValueError("--plot, --startup, --peer-python and --peer-model belong to --compare")
    else:
        report = {"results": alone(options, names)}
    head = {"model": Path(options.model).name, "dtype": options.dtype, "quantization": options.quantization}
    save(options, options.device, **head, **report)
    return 0
