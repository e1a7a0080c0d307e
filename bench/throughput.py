"""`seamwise bench throughput`: the fixed workloads through `LLM`, alone or beside peers, as text, JSON and plot."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from .command_line import command_line, parse, save
from .compare import add_peer_options, chosen_peers, compare, plot, print_table, table
from .engine_process import greedy, measure
from .machine import label
from .workloads import WORKLOADS


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
        runs = measure(generate, **WORKLOADS[name].job(vocab_size, options.repeats + 1))
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        results.append({"workload": name, **medians, "runs": runs})
        print(f"{label(device)} {name:8} {'  '.join(f'{k} {v:,.1f}' for k, v in medians.items())}")
    return results


def beside(options: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Run the workloads in Seamwise and in peers, a process each; print the table."""
    from seamwise.runtime.build.model_config import ModelConfig
    from seamwise.runtime.weights.hub import resolve_model

    directory = resolve_model(options.model)
    peers, models = chosen_peers(options)
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
    add_peer_options(parser)
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
