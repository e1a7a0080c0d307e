"""The `seamwise` command: generate, explain, compile, explain-key, bisect, bench."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

_LOADING = ("dtype", "device", "entry", "max_model_len", "load_format", "quantization", "kv_cache_dtype")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status. A ValueError of the library is printed as one line, status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    if not arguments:
        parser.print_help()
        return 0
    try:
        if arguments[0] == "bench":  # benchmarks live beside the library, and parse their own arguments
            return int(importlib.import_module("seamwise.bench.cli").main(arguments[1:]))
        options = parser.parse_args(arguments)
        return options.run(options)
    except ValueError as error:
        print(f"seamwise {arguments[0]}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `… | head`: Python would complain again when it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="seamwise")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int] | None, what: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=what, description=what)
        added.set_defaults(run=run)
        return added

    generate_ = command("generate", generate, "continue a prompt and print text, speed and where start-up time went")
    _model_options(generate_)
    generate_.add_argument("--prompt", required=True)
    generate_.add_argument("--chat", action="store_true", help="put the prompt through the model's chat template")
    generate_.add_argument("--max-tokens", type=int, default=64)
    generate_.add_argument("--temperature", type=float, default=0.0)
    generate_.add_argument("--top-p", type=float, default=1.0)
    generate_.add_argument("--top-k", type=int, default=0)
    generate_.add_argument("--seed", type=int)
    generate_.add_argument("--json", action="store_true", help="print one JSON object instead of text")

    what = "show what the compiler did with a model, without its weights: passes, misses, pieces, seams, start-up"
    explain_ = command("explain", explain, what)
    _model_options(explain_)
    explain_.add_argument("--json", action="store_true")
    explain_.add_argument("--source", action="store_true", help="print the generated program instead")
    explain_.add_argument("--validate", action="store_true", help="check every pass in float64 on drawn inputs")
    explain_.add_argument("--html", type=Path, help="write the explanation as one self-contained page")
    explain_.add_argument("--tp", type=int, default=1, help="explain the first of as many ranks, without the others")
    explain_.add_argument("--ep", action="store_true", help="with --tp: each rank has whole experts")
    explain_.add_argument(
        "--sp", type=int, nargs="?", const=1, default=0, metavar="TOKENS",
        help="with --tp: each rank norms its share of the rows, in steps of at least as many tokens",
    )  # fmt: skip
    explain_.add_argument("--async-tp", action="store_true", help="with --sp: rows travel while others are multiplied")

    compile_ = command("compile", compile_pack, "compile a model into a pack, which loads without tracing or compiling")
    _model_options(compile_)
    compile_.add_argument("-o", "--output", type=Path, required=True, help="the pack's directory")
    compile_.add_argument("--validate", action="store_true", help="check every pass in float64 on drawn inputs")

    differ = command("explain-key", explain_key, "say in what two packs differ; the status is 1 when they do")
    differ.add_argument("packs", nargs=2, type=Path, metavar="PACK")

    what = "compare two runs of a model op by op and name the first op that differs; the status is 1 when one does"
    bisect_ = command("bisect", bisect, what)
    bisect_.add_argument("--model", required=True, help="Hugging Face directory or hub id")
    words = "entry=own|transformers,dtype=float32|…,run=providers|meaning|reference,without=PASS|all"
    bisect_.add_argument("--a", default="", help=f"the first run: {words}, each optional")
    bisect_.add_argument("--b", required=True, help="the second run, e.g. entry=transformers,run=meaning,without=all")
    bisect_.add_argument("--case", default="7 tokens of 3 requests", help="the step that is run")
    bisect_.add_argument("--tolerance", type=float, default=1e-4, help="relative RMS from which ops differ")
    command("bench", None, "run a benchmark: throughput, startup, step, kernels, gpu, report")
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="Hugging Face directory or hub id")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--entry", default="auto", help="own: Seamwise's definition; transformers: the model's own class"
    )
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--load-format", default="auto", help="auto, safetensors, pt, npz, gguf; dummy: random weights")
    parser.add_argument(
        "--quantization",
        help="fp8, fp8_block, int8 or w4a16: quantize linear layers at load; gguf: keep integers packed",
    )
    parser.add_argument("--kv-cache-dtype", default="auto", help="fp8: keys and values in float8")
    parser.add_argument("--no-pack", action="store_true", help="compile anew, and keep nothing")


def _loading(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in _LOADING} | ({"pack_dir": None} if options.no_pack else {})


def generate(options: argparse.Namespace) -> int:
    """`seamwise generate`: one prompt, streamed to a terminal, then its figures."""
    from seamwise.runtime.sampling.params import SamplingParams

    from .llm import LLM

    params = SamplingParams(
        temperature=options.temperature, top_p=options.top_p, top_k=options.top_k, seed=options.seed,
        max_tokens=options.max_tokens,
    )  # fmt: skip
    llm = LLM(options.model, max_num_seqs=8, **_loading(options))
    engine, tokenizer = llm.engine, llm.tokenizer
    if tokenizer is None:
        raise ValueError(f"{options.model}: has no tokenizer, which --prompt needs")
    messages = [{"role": "user", "content": options.prompt}]
    template: dict[str, Any] = {"chat_template": None, "add_generation_prompt": True}
    ids = tokenizer.apply_chat_template(messages, **template) if options.chat else tokenizer.encode(options.prompt)
    engine.add_request("cli", ids, params, prompt=options.prompt)
    output, shown, first_token_s = None, 0, None
    while engine.has_unfinished_requests():
        for output in engine.step():
            first_token_s = first_token_s or _seconds_since_process_start()
            text = output.outputs[0].text
            if not options.json:
                print(text[shown:], end="", flush=True)
            shown = len(text)
    assert output is not None and first_token_s is not None
    figures = _figures(output, first_token_s)
    startup = engine.runner.startup_s
    if options.json:
        text, reason = output.outputs[0].text, output.outputs[0].finish_reason
        print(json.dumps({"text": text, "finish_reason": reason, **figures, "startup_s": startup}))
        return 0
    print(f"\n\n{figures['output_tokens']} tokens, {figures['decode_tokens_per_s']:.1f} tokens/s,", end=" ")
    print(f"time to first token {figures['ttft_ms']:.1f} ms")
    print(f"process start to first token {first_token_s:.2f} s, of which:")
    stages = {**startup, "first step": figures["ttft_ms"] / 1e3}
    rest = {"imports, tokenizer, allocation": first_token_s - sum(stages.values())}  # what no stage claims
    for stage, seconds in (rest | stages).items():
        print(f"  {stage:32} {seconds:6.2f} s")
    return 0


def _figures(output: Any, first_token_s: float) -> dict[str, float]:
    m, produced = output.metrics, len(output.outputs[0].token_ids)
    decode_s = m.finished_time - m.first_token_time
    return {
        "prompt_tokens": len(output.prompt_token_ids),
        "output_tokens": produced,
        "decode_tokens_per_s": (produced - 1) / decode_s if produced > 1 else 0.0,
        "ttft_ms": 1e3 * (m.first_token_time - m.arrival_time),
        "start_to_first_token_s": first_token_s,
    }


def _seconds_since_process_start() -> float:
    """Return the age of this process, from the kernel's own record (field 22 of /proc/self/stat, in clock ticks)."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return time.process_time()
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    return uptime_s - ticks / os.sysconf("SC_CLK_TCK")


def explain(options: argparse.Namespace) -> int:
    """`seamwise explain`: compile a model (or read its pack) and say what was done; no weights are read."""
    if options.validate and options.tp > 1:
        raise ValueError("--validate runs the graph, and --tp has no other ranks to run it with; leave one out")

    from seamwise.compile.explain.html import as_html
    from seamwise.compile.explain.text import as_json, as_text
    from seamwise.compile.pipeline import PipelineConfig
    from seamwise.runtime.build.model_config import ModelConfig
    from seamwise.runtime.build.packs import load_program
    from seamwise.runtime.build.progress import shown_ledger
    from seamwise.runtime.build.runner_config import RunnerConfig
    from seamwise.runtime.distributed.group import fake_group
    from seamwise.runtime.runner.recordings import CapturePlan
    from seamwise.runtime.weights.hub import resolve_model

    with shown_ledger("compile") as ledger:
        config = ModelConfig.from_directory(resolve_model(options.model))
        chosen = PipelineConfig(validate=options.validate, diffs=options.html is not None)
        ranks = {"tensor_parallel_size": options.tp, "enable_expert_parallel": options.ep}
        ranks |= {"enable_sequence_parallel": options.sp != 0, "enable_async_tp": options.async_tp}
        ranks["sp_min_token_num"] = options.sp or 1
        with fake_group(options.tp) if options.tp > 1 else nullcontext():
            settings = RunnerConfig.for_model(config, pipeline=chosen, **ranks, **_loading(options))
            program, _ = load_program(config, settings, ledger)
    if options.html:
        # The roofline is the benchmarks'.
        measure_ceilings = importlib.import_module("seamwise.bench.timing").measure_ceilings
        ceilings, dtype = measure_ceilings(settings.device), str(settings.dtype).removeprefix("torch.")
        title = f"{config.architecture}, {options.model}"
        options.html.write_text(as_html(program, ledger.seconds, title, partial(ceilings.least_us, dtype=dtype)))
    if options.source:
        print(program.source)
    elif options.json:
        print(json.dumps(as_json(program, ledger.seconds), indent=1))
    else:
        print(as_text(program, ledger.seconds), CapturePlan.of(program, settings), sep="\n")
    return 0


def compile_pack(options: argparse.Namespace) -> int:
    """`seamwise compile`: write a model's pack, for ModelRunner.load(PACK, offline=True)."""
    if options.no_pack:
        raise ValueError("compile: --no-pack keeps nothing, and -o names a pack; leave one out")

    from seamwise.compile.pipeline import PipelineConfig
    from seamwise.runtime.build.packs import write_pack
    from seamwise.runtime.build.progress import shown_ledger
    from seamwise.runtime.weights.hub import resolve_model

    pipeline = PipelineConfig(validate=options.validate)
    with shown_ledger("compile") as ledger:
        program = write_pack(
            resolve_model(options.model), options.output, ledger, pipeline=pipeline, **_loading(options)
        )
    seconds = sum(ledger.seconds.values())
    print(f"{options.output}: {len(program.calls)} pieces, {program.num_distinct} distinct, {seconds:.1f} s")
    return 0


def explain_key(options: argparse.Namespace) -> int:
    """`seamwise explain-key A B`: print the parts in which two packs' keys differ; the status is 1 when they do."""

    from seamwise.compile.pack import explain_key as differences
    from seamwise.compile.pack import manifest_of

    lines = differences(*(manifest_of(path)["parts"] for path in options.packs))
    print("\n".join(lines) or "the same key")
    return int(bool(lines))


def bisect(options: argparse.Namespace) -> int:
    """`seamwise bisect`: name the first op at which two runs differ; the status is 1 when one does."""
    from seamwise.compile.check.bisect import as_text
    from seamwise.runtime.build.bisect import bisect as compare_runs
    from seamwise.runtime.weights.hub import resolve_model

    directory, runs = resolve_model(options.model), (options.a, options.b)
    result = compare_runs(directory, *runs, case=options.case, tolerance=options.tolerance)
    print(as_text(result))
    return int(result.first is not None)
