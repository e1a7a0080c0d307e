"""`seamwise bench long-context`: a long prompt in chunks on a CPU, time by position, memory beside what was planned.

A token's work grows with what it attends to: a chunk's time per token is given beside the flops per token, both as
multiples of the first chunk's. Of a model that was trained at less, --yarn FACTOR stretches the RoPE.

memory  the most that the process took above what it had before a second runner was loaded, so that code and its tables
        do not count; planned: `runner.plan`, with a KV cache of the prompt's size
"""

from __future__ import annotations

import ctypes
import gc
import time
from pathlib import Path
from typing import Any

import numpy as np

from seamwise.runtime.build.step import ragged_step
from seamwise.runtime.runner.runner import ModelRunner
from seamwise.runtime.weights.hub import resolve_model

from .command_line import command_line, parse, save
from .machine import label


def status_bytes(name: str) -> int:
    """Return a size of /proc/self/status: VmRSS is now, VmHWM the most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def forget_peak() -> int:
    """Give what is free back to the system, begin VmHWM anew, and return what the process takes now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def flops_per_token(runner: ModelRunner, position: int) -> float:
    """Return the flops of a dense model's token at a position, without the head: linear layers, and attention."""
    config = runner.config
    shapes = [p.shape for p in runner.program.parameters.values() if len(p.shape) == 2]
    linear = sum(2 * rows * columns for rows, columns in shapes if rows != config.vocab_size)
    return linear + 4.0 * (position + 1) * config.num_layers * config.num_heads * config.head_dim


def prefill(runner: ModelRunner, tokens: int, chunk: int) -> list[dict[str, Any]]:
    """Compute a random prompt in chunks; return for each where it begins, seconds and flops of one of its tokens."""
    blocks = -(-tokens // runner.block_size)
    table = np.arange(1, 1 + blocks, dtype=np.int32)[None]
    ids = np.random.default_rng(0).integers(0, runner.config.vocab_size, tokens)
    rows = []
    for first in range(0, tokens, chunk):
        count = min(chunk, tokens - first)
        batch = ragged_step(ids[first : first + count], table, np.array([first]), np.array([count]), runner.block_size)
        began = time.perf_counter()
        runner.step(batch)
        seconds = (time.perf_counter() - began) / count
        rows.append({"first": first, "seconds": seconds, "flops": flops_per_token(runner, first + count // 2)})
    return rows


def measure(model: Path, tokens: int, chunk: int, **options: Any) -> dict[str, Any]:
    """Return the chunks of a prompt, with their times and flops as multiples of the first's, and bytes by the plan and
    as they were."""
    given = {"device": "cpu", "max_model_len": tokens, "disable_hybrid_kv_cache_manager": True, **options}
    runner = ModelRunner.load(model, **given)
    runner.allocate_kv(1 + -(-chunk // runner.block_size))
    prefill(runner, chunk, chunk)
    del runner
    before = forget_peak()
    runner = ModelRunner.load(model, **given)
    cache_bytes = (1 + -(-tokens // runner.block_size)) * runner.kv_spec.bytes_per_block
    plan = runner.plan(max_num_batched_tokens=chunk, max_num_seqs=1, kv_cache_memory_bytes=cache_bytes)
    runner.allocate_kv(plan.num_blocks)
    forget_peak()  # what loading took for a moment is not the prompt's
    rows = prefill(runner, tokens, chunk)
    taken = status_bytes("VmHWM") - before
    planned = plan.total_bytes - plan.recording_bytes  # nothing is replayed here
    for row in rows:
        row["times"], row["work"] = (row[name] / rows[0][name] for name in ("seconds", "flops"))
    return {"tokens": tokens, "chunk": chunk, "planned_bytes": planned, "measured_bytes": taken, "chunks": rows}


def main(arguments: list[str]) -> int:
    """Parse arguments, measure, print, write JSON when asked."""
    parser = command_line("long-context", __doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a step (max_num_batched_tokens)")
    parser.add_argument("--yarn", type=float, metavar="FACTOR", help="stretch the model's RoPE so many times by YaRN")
    options = parse(parser, arguments)
    yarn = {"hf_overrides": {"rope_parameters": {"rope_type": "yarn", "factor": options.yarn}}} if options.yarn else {}
    found = measure(resolve_model(options.model), options.tokens, options.chunk, **yarn)
    print(f"{label()}, one prompt of {options.tokens} tokens in chunks of {options.chunk}; × is of the first chunk's")
    print(f"{'from token':>10} {'ms a token':>10} {'×':>6} {'MFLOP':>8} {'×':>6} {'GFLOP/s':>8}")
    for row in found["chunks"]:
        seconds, flops = row["seconds"], row["flops"]
        shown = f"{row['first']:10} {1e3 * seconds:10.3f} {row['times']:6.2f} {flops / 1e6:8.0f} {row['work']:6.2f}"
        print(f"{shown} {flops / seconds / 1e9:8.1f}", flush=True)
    planned, taken = found["planned_bytes"], found["measured_bytes"]
    print(f"memory: planned {planned / 1e6:.1f} MB, measured {taken / 1e6:.1f} MB ({taken / planned:.3f})")
    save(options, **found)
    return 0
