"""Timing with cold caches, and what the device can do at most, measured in the same run."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_FLUSH_BYTES = 256 << 20
Row = dict[str, Any]  # what is measured, by name


def median_us(call: Callable[[], Any], device: str, *, repeats: int = 15, warmup: int = 3) -> tuple[float, float]:
    """Return the median and the spread (interquartile range) of a call's time in us; caches are cold before each.

    Between calls a buffer larger than the last-level cache is read, so that inputs come from memory. It is not
    written: a GPU would write its lines back during the call that is timed.
    """
    flush = _flush_buffer(device)
    times = []
    for _ in range(repeats + warmup):
        flush.max()
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
    quartiles = statistics.quantiles(times[warmup:], n=4)
    return quartiles[1], quartiles[2] - quartiles[0]


@functools.cache
def _flush_buffer(device: str) -> torch.Tensor:
    return torch.zeros(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What the device was seen to do: bytes copied (read plus written) and matrix products, per second."""

    copy_gb_per_s: float
    matmul_tflop_per_s: dict[str, float]

    def least_us(self, num_bytes: int, flops: int, dtype: str) -> float:
        """Return the time that these ceilings allow at best: a point of the roofline (Williams et al. 2009,
        https://doi.org/10.1145/1498765.1498785)."""
        return max(num_bytes / self.copy_gb_per_s / 1e3, flops / self.best_tflop_per_s(dtype) / 1e6)

    def best_tflop_per_s(self, dtype: str) -> float:
        """Return the best rate of products in this dtype or a wider one: without instructions for bfloat16, torch's
        products of it take hundreds of times as long as those of float32, which hold the same numbers."""
        wider = [rate for name, rate in self.matmul_tflop_per_s.items() if name != "bfloat16" or dtype != "float32"]
        return max(wider)


def copy_rate(device: str, num_bytes: int) -> Row:
    """Copy random bytes; GB/s counts bytes read and written."""
    source = torch.randint(256, (num_bytes,), dtype=torch.uint8, device=device)
    sink = torch.empty_like(source)
    us, spread_us = median_us(lambda: sink.copy_(source), device)
    return {"gb_per_s": 2 * num_bytes / us / 1e3, "us": us, "spread_us": spread_us}


def read_rate(device: str, num_bytes: int) -> Row:
    """Read random numbers: the faster of a sum and a maximum."""
    values = torch.rand(num_bytes // 4, device=device)
    us, spread_us = min(median_us(call, device) for call in (values.sum, values.max))
    return {"gb_per_s": values.nbytes / us / 1e3, "us": us, "spread_us": spread_us}


def matmul_rate(device: str, size: int, dtype: torch.dtype) -> Row:
    """Multiply square matrices of random numbers; float8 ones scaled into bfloat16, by rows and columns on a GPU."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    call = functools.partial(torch.matmul, a, b)
    if dtype == torch.float8_e4m3fn:
        # A CPU takes one scale only before torch 2.12.
        of_rows, of_columns = ((size, 1), (1, size)) if device == "cuda" else ((), ())
        rows, columns = torch.ones(of_rows, device=device), torch.ones(of_columns, device=device)
        call = functools.partial(torch._scaled_mm, a, b.T, rows, columns, out_dtype=torch.bfloat16)
    us, spread_us = median_us(call, device, repeats=9)
    return {"tflop_per_s": 2 * size**3 / us / 1e6, "us": us, "spread_us": spread_us}


def measure_ceilings(device: str) -> Ceilings:
    """Measure a copy of 256 MiB and products of square matrices."""
    size = 8192 if device == "cuda" else 1024
    products = {str(d).removeprefix("torch."): matmul_rate(device, size, d) for d in (torch.bfloat16, torch.float32)}
    return Ceilings(
        copy_gb_per_s=copy_rate(device, _FLUSH_BYTES)["gb_per_s"],
        matmul_tflop_per_s={dtype: row["tflop_per_s"] for dtype, row in products.items()},
    )
