"""`seamwise bench throughput`: the fixed workloads through `LLM`, medians over repeated runs, as text and JSON."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from .workloads import WORKLOADS, Workload


def measure(llm: Any, workload: Workload, *, repeats: int, vocab_size: int) -> dict[str, Any]:
    """Run a workload `repeats` times after one warm-up, each on fresh prompts so that no prefix is cached before.

    Returns the medians, and every run's value: prompt_tokens_per_s, output_tokens_per_s, and for one request
    decode_tokens_per_s (tokens after the first) and ttft_ms.
    """
    from seamwise import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=workload.output_tokens, ignore_eos=True, detokenize=False)
    runs: list[dict[str, float]] = []
    for run in range(repeats + 1):
        prompts = [{"prompt_token_ids": p} for p in workload.prompts(vocab_size, seed=run)]
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        elapsed_s = time.perf_counter() - started
        produced = sum(len(o.outputs[0].token_ids) for o in outputs)
        wanted = workload.num_requests * workload.output_tokens
        if produced != wanted:
            raise RuntimeError(f"{workload.name}: {produced} tokens produced, wanted {wanted}")
        row = {"prompt_tokens_per_s": workload.prompt_tokens / elapsed_s, "output_tokens_per_s": produced / elapsed_s}
        if workload.num_requests == 1:
            m = outputs[0].metrics
            row["ttft_ms"] = 1e3 * (m.first_token_time - m.arrival_time)
            row["decode_tokens_per_s"] = (produced - 1) / (m.finished_time - m.first_token_time)
        runs.append(row)
    counted = runs[1:]
    medians = {key: statistics.median(r[key] for r in counted) for key in counted[0]}
    return {"workload": workload.name, **medians, "runs": counted}


def main(arguments: list[str]) -> int:
    """Parse arguments, run, print one line a workload and write JSON when asked."""
    parser = argparse.ArgumentParser(prog="seamwise bench throughput", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--workload", choices=[*WORKLOADS, "all"], default="all")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--entry", default="auto", choices=["auto", "own", "transformers"])
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    from seamwise import LLM

    names = list(WORKLOADS) if options.workload == "all" else [options.workload]
    llm = LLM(
        options.model, dtype=options.dtype, device=options.device, entry=options.entry,
        enforce_eager=options.enforce_eager, max_model_len=options.max_model_len, max_num_seqs=64,
    )  # fmt: skip
    vocab_size = llm.engine.runner.config.vocab_size
    results = []
    for name in names:
        result = measure(llm, WORKLOADS[name], repeats=options.repeats, vocab_size=vocab_size)
        results.append(result)
        figures = "  ".join(f"{k} {v:,.1f}" for k, v in result.items() if isinstance(v, float))
        print(f"{name:8} {figures}")
    if options.json:
        report = {"machine": machine(), "model": options.model, "dtype": options.dtype, "results": results}
        options.json.write_text(json.dumps(report, indent=1))
    return 0


def machine() -> dict[str, Any]:
    """Return what a result must name to be comparable: device, threads, versions, commit."""
    import triton

    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    ).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit or "unknown",
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
