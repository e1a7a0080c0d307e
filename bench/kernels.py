"""`seamwise bench kernels`: every contract's provider against its eager meaning and torch.compile of it.

Time is the median over repeated calls; between calls a buffer larger than the last-level cache is written, so inputs
come from memory. Bandwidth and FLOP/s follow from the contract's cost, and are put beside the device's own copy
bandwidth, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import seamwise.kernels  # noqa: F401  (registers every contract)
from seamwise.kernels.contract import CONTRACTS, Contract

from .throughput import machine

_FLUSH_BYTES = 256 << 20


def median_us(call: Callable[[], Any], device: str, *, repeats: int = 15) -> tuple[float, float]:
    """Return the median and the spread (interquartile range) of a call's time in us, with cold caches."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    times = []
    for _ in range(repeats + 3):
        flush.zero_()
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(1e3 * start.elapsed_time(end))
        else:
            began = time.perf_counter()
            call()
            times.append(1e6 * (time.perf_counter() - began))
    quartiles = statistics.quantiles(times[3:], n=4)
    return quartiles[1], quartiles[2] - quartiles[0]


def copy_gb_per_s(device: str) -> float:
    """Return the bandwidth of copying 256 MiB, read plus written."""
    source = torch.ones(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    sink = torch.empty_like(source)
    us, _ = median_us(lambda: sink.copy_(source), device)
    return 2 * _FLUSH_BYTES / us / 1e3


def measure(
    contract: Contract, sizes: Mapping[str, int], *, dtype: torch.dtype, device: str, compiled: bool
) -> dict[str, Any]:
    """Measure one contract at one size: its chosen provider, the eager meaning, and torch.compile of the meaning."""
    args = contract.make_inputs(sizes, dtype=dtype, device=device)
    cost, provider = contract.cost(*args), contract.choose(args)
    us, spread_us = median_us(lambda: provider.call(*args), device)
    row = {
        "us": us, "spread_us": spread_us, "provider": provider.name, "gb_per_s": cost.bytes / us / 1e3,
        "tflop_per_s": cost.flops / us / 1e6, "x_eager": median_us(lambda: contract.meaning(*args), device)[0] / us,
        "x_compile": None,
    }  # fmt: skip
    if compiled and not contract.seam and not contract.opaque:
        function = torch.compile(contract.meaning)
        function(*args)
        row["x_compile"] = median_us(lambda: function(*args), device)[0] / us
    return row


def main(arguments: list[str]) -> int:
    """Parse arguments, measure, print a line a shape, write JSON when asked."""
    parser = argparse.ArgumentParser(prog="seamwise bench kernels", description=__doc__)
    parser.add_argument("names", nargs="*", help="contracts (default: all)")
    parser.add_argument("--list", action="store_true", help="list contracts with their providers and shapes")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes seconds a shape)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    names = options.names or sorted(CONTRACTS)
    if unknown := [n for n in names if n not in CONTRACTS]:
        raise ValueError(f"no contract named {unknown[0]!r}; there are: {', '.join(sorted(CONTRACTS))}")
    if options.list:
        for name in names:
            record = CONTRACTS[name]
            print(f"{name:16} {'/'.join(p.name for p in record.providers):18} {'; '.join(record.shapes)}")
            print(f"{'':16} {' '.join((record.meaning.__doc__ or '').split())}")
        return 0
    ceiling = copy_gb_per_s(options.device)
    print(f"copy of 256 MiB: {ceiling:.1f} GB/s (read + write)")
    rows = []
    for name in names:
        for label, sizes in CONTRACTS[name].shapes.items():
            row = measure(
                CONTRACTS[name], sizes, dtype=getattr(torch, options.dtype), device=options.device,
                compiled=not options.no_compile,
            )  # fmt: skip
            rows.append({"contract": name, "shape": label, **sizes, "dtype": options.dtype, **row})
            shape = " ".join(f"{k}={v}" for k, v in sizes.items())
            against = f"{row['x_compile']:.2f}x torch.compile" if row["x_compile"] else "-"
            print(
                f"{name:14} {shape:44} {options.dtype} {row['provider']:6} | {row['us']:9.1f} us | "
                f"{row['gb_per_s']:7.1f} GB/s | {100 * row['gb_per_s'] / ceiling:4.0f} % of copy | "
                f"{row['tflop_per_s']:6.3f} TFLOP/s | {row['x_eager']:5.2f}x eager | {against}"
            )
    if options.json:
        report = {"machine": machine(), "copy_gb_per_s": ceiling, "rows": rows}
        options.json.write_text(json.dumps(report, indent=1))
    return 0


