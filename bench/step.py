"""`seamwise bench step`: where a decode step's time goes on a CPU, beside what the machine can do.

The whole step is timed as the engine runs it (one replay of its tape), then call by call. GEMMs are given with the
bandwidth of reading their weights and their FLOP/s, attention with the bandwidth of reading keys and values; host is
what the whole step takes beyond its kernels.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seamwise.runtime.build.step import StepInput, ragged_step
from seamwise.runtime.runner.runner import ModelRunner
from seamwise.runtime.weights.hub import resolve_model

from .command_line import command_line, parse, save
from .machine import label
from .timing import measure_ceilings, read_rate

REPEATS = 40


def decode_batch(runner: ModelRunner, requests: int, context: int) -> StepInput:
    """Return a step in which each of the requests decodes one token after `context` others, in blocks of its own."""
    blocks = -(-(context + 1) // runner.block_size)
    table = 1 + np.arange(requests * blocks, dtype=np.int32).reshape(requests, blocks)
    tokens = np.random.default_rng(0).integers(runner.config.vocab_size, size=requests)
    known, new = np.full(requests, context), np.ones(requests, dtype=np.int32)
    return ragged_step(tokens, table, known, new, runner.block_size)


def profile(runner: ModelRunner, requests: int, context: int) -> dict[str, Any]:
    """Return the medians, in us: the step, its GEMMs, attention, other kernels, host; and what they reach."""
    batch = decode_batch(runner, requests, context)
    runner.step(batch)
    steps = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        runner.step(batch)
        steps.append(1e6 * (time.perf_counter() - began))
    tape = runner.recording(requests).graph
    with torch.inference_mode():
        rounds = [tape.profile() for _ in range(REPEATS)]
    by_call = zip(*([seconds for *_, seconds in done] for done in rounds), strict=True)
    medians_us = [1e6 * statistics.median(seconds) for seconds in by_call]
    calls = [(name, args, us) for (name, args, _), us in zip(rounds[0], medians_us, strict=True)]
    gemms = [(args, us) for name, args, us in calls if name == "seamwise_linear" and not args[15]]
    attention_us = sum(us for name, _, us in calls if "attention" in name)
    gemm_us, kernel_us, step_us = sum(us for _, us in gemms), sum(us for *_, us in calls), statistics.median(steps)
    # seamwise_linear(kind, x, packed, bias, y, M, N, K, …), 15 of which are experts' order; scales are not counted
    weight_bytes = sum(args[6] * args[7] * (32, 16, 4, 8, 8)[int(args[0])] / 8 for args, _ in gemms)
    flops = sum(2 * args[5] * args[6] * args[7] for args, _ in gemms)
    kv_bytes = requests * (context + 1) * runner.kv_spec.bytes_per_token
    by_kernel: dict[str, float] = {}
    for name, _, us in calls:
        by_kernel[name] = by_kernel.get(name, 0.0) + us
    return {
        "requests": requests, "context": context, "step_us": step_us, "gemm_us": gemm_us, "attention_us": attention_us,
        "other_kernels_us": kernel_us - gemm_us - attention_us, "host_us": step_us - kernel_us,
        "gemm_gb_per_s": weight_bytes / gemm_us / 1e3, "gemm_gflop_per_s": flops / gemm_us / 1e3,
        "attention_gb_per_s": kv_bytes / attention_us / 1e3, "tokens_per_s": 1e6 * requests / step_us,
        "by_kernel_us": by_kernel,
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    """Parse arguments, profile, print, write JSON when asked."""
    parser = command_line("step", __doc__)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--load-format", default="auto", help="dummy: seeded random weights")
    parser.add_argument("--batch", default="1,32", help="requests, comma-separated (default 1,32)")
    parser.add_argument("--context", type=int, default=192, help="tokens before the decoded one")
    options = parse(parser, arguments)
    sizes = [int(n) for n in options.batch.split(",")]
    runner = ModelRunner.load(
        resolve_model(options.model), dtype=options.dtype, device="cpu", load_format=options.load_format,
        max_model_len=options.context + 1, max_recorded_requests=max(sizes), disable_hybrid_kv_cache_manager=True,
    )  # fmt: skip
    runner.allocate_kv(max(sizes) * -(-(options.context + 1) // runner.block_size) + 1)
    ceilings = measure_ceilings("cpu")
    read_gb_per_s = read_rate("cpu", 512 << 20)["gb_per_s"]
    peak = 1e3 * ceilings.best_tflop_per_s("bfloat16")
    rates = f"read {read_gb_per_s:.1f} GB/s, copy {ceilings.copy_gb_per_s:.1f} GB/s, bf16 {peak:.0f} GFLOP/s"
    print(f"ceilings, {label()}: {rates}")
    rows = [profile(runner, size, options.context) for size in sizes]
    for row in rows:
        print(
            f"{label()} batch {row['requests']:3}, context {row['context']}: {row['step_us'] / 1e3:.2f} ms"
            f" = GEMM {row['gemm_us'] / 1e3:.2f}"
            f" ({row['gemm_gb_per_s']:.0f} GB/s, {row['gemm_gflop_per_s']:.0f} GFLOP/s)"
            f" + attention {row['attention_us'] / 1e3:.2f} ({row['attention_gb_per_s']:.0f} GB/s)"
            f" + other kernels {row['other_kernels_us'] / 1e3:.2f} + host {row['host_us'] / 1e3:.2f}"
        )
    head = {"model": Path(options.model).name, "read_gb_per_s": read_gb_per_s}
    save(options, **head, copy_gb_per_s=ceilings.copy_gb_per_s, bf16_gflop_per_s=peak, rows=rows)
    return 0
