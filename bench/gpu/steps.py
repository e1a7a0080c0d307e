"""Stage 4 of `seamwise bench gpu`: decode steps of Llama-3-8B shapes: device and host time, capture, each pass's worth.

graph     the recorded step, replayed
piecewise  recorded between its seams, which are called
compiled  the same program, its kernels launched one by one
eager     every pass off: the model's own ops, one by one
"""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from seamwise.bench.step import decode_batch
from seamwise.compile.pipeline import PipelineConfig, ordered_passes
from seamwise.compile.startup_times import Ledger
from seamwise.kernels.cpu.tape import Tape
from seamwise.runtime.runner.runner import ModelRunner

from .models import model_directory
from .rows import Absent, Context, Lazy, Row
from .runs import SCHEMES, free_memory

MODEL = "llama-3-8b"
SIZES = (1, 2, 4, *range(8, 257, 8))
REAL: dict[str, Any] = {"context": 1024, "batches": (1, 8, 64, 256), "worth": (1, 64), "sizes": SIZES, "burst": 20}
TINY: dict[str, Any] = {"context": 20, "batches": (1, 4), "worth": (2,), "sizes": (1, 2, 4), "burst": 2}
GROUPS = {"attention": r"attention|mla|flash", "gemm": r"linear|gemm|nvjet|cutlass|cublas|matmul|splitk|wise_kernel"}
_LOAD_S = 25.0


def rows(context: Context) -> Iterator[Row]:
    """Yield steps by scheme, mode and batch, the capture of every size, where a step's time goes, and passes' worth."""
    shapes = TINY if context.tiny else REAL
    for scheme, quantization in SCHEMES.items():
        head = f"steps/{MODEL}/{scheme}"
        build = partial(load, context, shapes["context"], quantization=quantization)
        runner = Lazy(partial(build, max(shapes["batches"])), _LOAD_S)
        for mode, estimate_s in (("graph", 4), ("piecewise", 5), ("compiled", 6)):
            for batch in shapes["batches"]:
                measure = partial(measure_step, runner, mode, batch, shapes)
                yield from context.take(f"{head}/{mode}/{batch}", estimate_s + runner.pending_s, measure)
        capture = partial(measure_capture, runner, shapes["sizes"])
        yield from context.take(f"{head}/capture", 15 + runner.pending_s, capture)
        for batch in shapes["batches"]:
            parts = partial(breakdown, runner, batch, shapes["context"])
            yield from context.take(f"{head}/breakdown/{batch}", 6 + runner.pending_s, parts, extra=True)
        loaded = not runner.pending_s
        del runner, measure, capture, parts
        if loaded:
            free_memory(context.device)
        if context.extras:
            yield from without_passes(context, head, shapes, build)


def without_passes(
    context: Context, head: str, shapes: dict[str, Any], build: Callable[..., ModelRunner]
) -> Iterator[Row]:
    """Yield steps with every pass off, then with each off that fused something in the measured steps."""
    names = tuple(p.name for group in ordered_passes() for p in group)
    off = tuple(n for n in names if n != "quantize_linear")  # without which it is another model
    eager = Lazy(partial(build, max(shapes["batches"]), disabled=off), _LOAD_S)
    for batch in shapes["batches"]:
        measure = partial(measure_step, eager, "compiled", batch, shapes)
        yield from context.take(f"{head}/eager/{batch}", 8 + eager.pending_s, measure, extra=True)
    matched = context.results.rows.get(f"{head}/graph/{shapes['batches'][0]}", {}).get("passes", {})
    fused = [n for n in names if n.startswith("fuse_") and matched.get(n)]
    for name in fused[:1] if context.tiny else fused:
        less = Lazy(partial(build, max(shapes["worth"]), disabled=(name,), allow_missed=names), _LOAD_S)
        del measure
        for batch in shapes["worth"]:
            measure = partial(measure_step, less, "graph", batch, shapes)
            yield from context.take(f"{head}/without {name}/{batch}", 4 + less.pending_s, measure, extra=True)


def load(context: Context, length: int, requests: int, *, quantization: str | None, **pipeline: Any) -> ModelRunner:
    """Load random weights, and allocate the KV cache of so many requests of `length` tokens and one more."""
    with model_directory(MODEL, context.tiny) as directory:
        runner = ModelRunner.load(
            directory, dtype="bfloat16", device=context.device, load_format="dummy", quantization=quantization,
            max_model_len=length + 1, max_recorded_requests=requests, pipeline=PipelineConfig(**pipeline),
            pack_dir=None,
        )  # fmt: skip
    runner.allocate_kv(requests * -(-(length + 1) // runner.block_size) + 1)
    return runner


def unrecorded(runner: ModelRunner, **changes: Any) -> ModelRunner:
    """Return a runner of the same program, weights and KV cache that has recorded nothing, with changed options."""
    options = replace(runner.options, **changes)
    fresh = ModelRunner(runner.config, options, runner.executable, Ledger(), runner.buffers)
    fresh.use_kv(runner.kv_caches, runner.num_blocks)
    return fresh


def measure_step(lazy: Lazy[ModelRunner], mode: str, requests: int, shapes: dict[str, Any]) -> Row:
    """Time decode steps: back to back (the device's time where that is the longer), and the host's part of one.

    weight_bytes  what a step reads of the weights: all, but of an embedding that is not the head too only rows
    host_us       until `step` returns, the device idle before: what the host can never take less than
    """
    runner = lazy()
    startup_s = round(sum(runner.startup_s.values()), 1)
    if mode != "graph":
        runner = unrecorded(runner, cudagraph_mode="none" if mode == "compiled" else mode)
    batch, burst, device = decode_batch(runner, requests, shapes["context"]), shapes["burst"], runner.options.device
    for _ in range(3):
        runner.step(batch)
    steps_us, host_us = [], []
    for _ in range(5):
        wait(device)
        began = time.perf_counter()
        for _ in range(burst):
            runner.step(batch)
        wait(device)
        steps_us.append(1e6 * (time.perf_counter() - began) / burst)
    for _ in range(2 * burst):
        wait(device)
        began = time.perf_counter()
        runner.step(batch)
        host_us.append(1e6 * (time.perf_counter() - began))
    config = runner.config
    embedding = 0 if config.raw["tie_word_embeddings"] else config.vocab_size * config.hidden_size * 2
    step_us = statistics.median(steps_us)
    return {
        "step_us": step_us, "spread_us": max(steps_us) - min(steps_us), "host_us": statistics.median(host_us),
        "tokens_per_s": 1e6 * requests / step_us, "requests": requests, "context": shapes["context"],
        "weight_bytes": sum(w.nbytes for w in runner.executable.weights) - embedding,
        "kv_bytes": requests * (shapes["context"] + 1) * runner.kv_spec.bytes_per_token,
        "layers": config.num_layers, "startup_s": startup_s,
        "passes": {r.name: r.matched for r in runner.program.reports}, "providers": runner.program.providers,
    }  # fmt: skip


def measure_capture(lazy: Lazy[ModelRunner], sizes: Sequence[int]) -> Row:
    """Record a step of every size, the largest first, in a new recorder; kernels are compiled before."""
    runner = lazy()
    device = runner.options.device
    for size in sizes:
        runner.step(decode_batch(runner, size, 1))
    fresh = unrecorded(runner)
    gc.collect()
    before = free_bytes(device)
    began = time.perf_counter()
    for size in sorted(sizes, reverse=True):
        fresh.step(decode_batch(fresh, size, 1))
    wait(device)
    seconds = time.perf_counter() - began
    held = fresh.recording_stats.num_bytes if device == "cpu" else before - free_bytes(device)
    return {"capture_s": seconds, "capture_bytes": held, "sizes": len(sizes), "layers": runner.config.num_layers}


def breakdown(lazy: Lazy[ModelRunner], requests: int, context: int) -> Row:
    """Return the time of one recorded step by kernel, and by what the kernels do; us."""
    runner, rounds = lazy(), 5
    batch = decode_batch(runner, requests, context)
    runner.step(batch)
    kernels_us: dict[str, float] = {}
    if runner.options.device == "cpu":
        tape = runner.recording(requests).graph
        assert isinstance(tape, Tape)
        with torch.inference_mode():
            for name, _, seconds in (call for _ in range(rounds) for call in tape.profile()):
                kernels_us[name] = kernels_us.get(name, 0.0) + 1e6 * seconds / rounds
    else:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(rounds):
                runner.step(batch)
            torch.cuda.synchronize()
        kernels_us = {e.key: e.self_device_time_total / rounds for e in seen.key_averages()}
        kernels_us = {name: us for name, us in kernels_us.items() if us > 0}
        if not kernels_us:
            raise Absent("the profiler sees no kernel on this machine (CUPTI)")
    row: Row = {f"{group}_us": 0.0 for group in (*GROUPS, "other")}
    for name, us in kernels_us.items():
        row[f"{next((g for g, pattern in GROUPS.items() if re.search(pattern, name, re.I)), 'other')}_us"] += us
    most = sorted(kernels_us.items(), key=lambda item: -item[1])[:20]
    return row | {"requests": requests, "kernels_us": dict(most)}


def free_bytes(device: str) -> int:
    """Return the device memory that neither torch nor a graph holds; 0 on a CPU."""
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def wait(device: str) -> None:
    """Wait for the device."""
    if device != "cpu":
        torch.cuda.synchronize()
