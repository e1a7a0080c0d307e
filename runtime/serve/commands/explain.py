"""`seamwise explain`: what the compiler did with a model; no weights are read."""

from __future__ import annotations

import argparse
import importlib
import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import Commands, add_command, loading, model_options

if TYPE_CHECKING:
    from seamwise.compile.startup_times import Ledger
    from seamwise.runtime.build.model_config import ModelConfig


def add(commands: Commands) -> None:
    what = "show what the compiler did with a model, without its weights: passes, misses, pieces, seams, start-up"
    parser = add_command(commands, "explain", run, what)
    model_options(parser)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--source", action="store_true", help="print the generated program instead")
    parser.add_argument("--validate", action="store_true", help="check every pass in float64 on drawn inputs")
    parser.add_argument("--html", type=Path, help="write the explanation as one self-contained page")
    parser.add_argument("--tp", type=int, default=1, help="explain the first of as many ranks, without the others")
    parser.add_argument("--dp", type=int, default=1, help="of as many ranks with requests of their own; needs --ep")
    parser.add_argument(
        "--ep", type=int, nargs="?", const=0, metavar="N",
        help="with --tp or --dp: each rank has whole experts; N: over N ranks with requests of their own, as --dp N",
    )  # fmt: skip
    parser.add_argument(
        "--eplb", type=int, metavar="N", help="with --ep: experts move by their load, and have N places more than are"
    )  # fmt: skip
    parser.add_argument(
        "--sp", type=int, nargs="?", const=1, default=0, metavar="TOKENS",
        help="with --tp: each rank norms its share of the rows, in steps of at least as many tokens",
    )  # fmt: skip
    parser.add_argument("--pp", type=int, default=1, help="of as many stages: memory of each, and what is sent on")
    parser.add_argument("--async-tp", action="store_true", help="with --sp: rows travel while others are multiplied")


def run(options: argparse.Namespace) -> int:
    """`seamwise explain`: compile a model (or read its pack) and say what was done; no weights are read."""
    if options.ep:
        if max(options.tp, options.dp) > 1:
            raise ValueError(f"--ep {options.ep} is --dp {options.ep} --ep; beside --tp or --dp, give --ep alone")
        options.dp = options.ep
    if options.eplb is not None and options.dp == 1:
        raise ValueError(f"--eplb {options.eplb} is of experts that ranks share out; give --ep N too")
    if options.validate and max(options.tp, options.dp) > 1:
        raise ValueError(
            "--validate runs the graph, and there are no other ranks to run it with; leave out one of both"
        )

    if options.pp > 1 and (options.validate or options.html or options.source or max(options.tp, options.dp) > 1):
        raise ValueError(
            "--pp tells of each stage its memory; leave out --tp, --dp, --ep, --validate, --html and --source"
        )

    from seamwise.compile import pack
    from seamwise.compile.explain.html import as_html
    from seamwise.compile.explain.text import as_json, as_text, balance_text
    from seamwise.compile.explain.traffic import balance_of
    from seamwise.compile.pipeline import PipelineConfig
    from seamwise.runtime.build.model_config import ModelConfig
    from seamwise.runtime.build.packs import load_program, open_pack
    from seamwise.runtime.build.progress import shown_ledger
    from seamwise.runtime.build.ranks import placed
    from seamwise.runtime.build.runner_config import RunnerConfig
    from seamwise.runtime.distributed.group import fake_group
    from seamwise.runtime.runner.recordings import CapturePlan
    from seamwise.runtime.weights.hub import resolve_model

    model, given = resolve_model(options.model), loading(options)
    packed = pack.is_pack(model)
    if packed and (options.validate or max(options.tp, options.dp, options.pp) > 1):
        raise ValueError(
            f"{model} is a pack, as it was made; --validate, --tp, --dp, --ep and --pp need the model's directory"
        )
    if packed:
        model, given = open_pack(model, given)
    with shown_ledger("compile") as ledger:
        config = ModelConfig.from_directory(model, given.get("hf_overrides"))
        chosen = PipelineConfig(validate=options.validate, diffs=options.html is not None)
        if options.pp > 1:
            return _stages(config, options, given, ledger)
        ranks = {"tensor_parallel_size": options.tp, "enable_expert_parallel": options.ep is not None}
        ranks["data_parallel_size"] = options.dp
        ranks |= {"enable_sequence_parallel": options.sp != 0, "enable_async_tp": options.async_tp}
        ranks["sp_min_token_num"] = options.sp or 1
        if options.eplb is not None:
            ranks |= {"enable_eplb": True, "eplb_config": {"num_redundant_experts": options.eplb}}
        size = max(options.tp, options.dp)
        with fake_group(size) if size > 1 else nullcontext():
            settings = placed(RunnerConfig.for_model(config, **({"pipeline": chosen} | ranks | given)))
            program, _ = load_program(config, settings, ledger)
    balance = None if options.eplb is None else balance_of(program, settings.dtype)
    if options.html:
        # The roofline is the benchmarks'.
        measure_ceilings = importlib.import_module("seamwise.bench.timing").measure_ceilings
        ceilings, dtype = measure_ceilings(settings.device), str(settings.dtype).removeprefix("torch.")
        title = f"{config.architecture}, {options.model}"
        options.html.write_text(as_html(program, ledger.seconds, title, partial(ceilings.least_us, dtype=dtype)))
    if options.source:
        print(program.source)
    elif options.json:
        print(json.dumps(as_json(program, ledger.seconds) | ({"balance": balance} if balance else {}), indent=1))
    else:
        print(as_text(program, ledger.seconds), *([balance_text(balance)] if balance else []), sep="\n")
        print(CapturePlan.of(program, settings))
    return 0


def _stages(config: ModelConfig, options: argparse.Namespace, given: dict[str, Any], ledger: Ledger) -> int:
    """Compile each stage, and say what it holds and what it takes from the one before."""
    from seamwise.compile.explain.text import as_json
    from seamwise.compile.pipeline import PipelineConfig
    from seamwise.runtime.build.packs import load_program
    from seamwise.runtime.build.runner_config import RunnerConfig

    found = []
    for stage in range(options.pp):
        chosen = PipelineConfig(stage=(stage, options.pp))
        settings = RunnerConfig.for_model(config, **({"pipeline": chosen} | given))
        program, _ = load_program(config, settings, ledger)
        found.append(as_json(program, ledger.seconds) | {"stage": stage, "layers": len(program.kv_layers)})
    if options.json:
        print(json.dumps({"stages": found}, indent=1))
        return 0
    print(f"{'stage':>5} {'layers':>6} {'weights':>12} {'a cached token':>15} {'taken a token':>14}")
    for each in found:
        weights, cached, taken = each["weight_bytes"] / 1e6, each["kv_bytes_per_token"], each["taken_bytes_per_token"]
        print(f"{each['stage']:5} {each['layers']:6} {weights:9.1f} MB {cached:13} B {taken:12} B")
    return 0
