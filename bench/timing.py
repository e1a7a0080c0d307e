"""Timing with cold caches, and what the device can do at most, measured in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

_FLUSH_BYTES = 256 << 20


def median_us(call: Callable[[], Any], device: str, *, repeats: int = 15, warmup: int = 3) -> tuple[float, float]:
    """Return the median and the spread (interquartile range) of a call's time in us; caches are cold before each.

    Between calls a buffer larger than the last-level cache is written, so that inputs come from memory.
    """
    flush = _flush_buffer(device)
    times = []
    for _ in range(repeats + warmup):
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
    quartiles = statistics.quantiles(times[warmup:], n=4)
    return quartiles[1], quartiles[2] - quartiles[0]


@cache
def _flush_buffer(device: str) -> torch.Tensor:
    return torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What the device was seen to do: bytes copied (read plus written) and matrix products, per second."""

    copy_gb_per_s: float
    matmul_tflop_per_s: dict[str, float]

    def least_us(self, num_bytes: int, flops: int, dtype: str) -> float:
        """Return the time that these ceilings allow at best: a point of the roofline (Williams et al. 2009,
        https://doi.org/10.1145/1498765.1498785)."""
        matmul = self.matmul_tflop_per_s.get(dtype, self.matmul_tflop_per_s["bfloat16"])
        return max(num_bytes / self.copy_gb_per_s / 1e3, flops / matmul / 1e6)


def measure_ceilings(device: str) -> Ceilings:
    """Measure a copy of 256 MiB and square matrix products of random numbers."""
    source = torch.ones(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    sink = torch.empty_like(source)
    copy_us, _ = median_us(lambda: sink.copy_(source), device)
    matmul, size = {}, 8192 if device == "cuda" else 1024
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        us, _ = median_us(lambda a=a, b=b: a @ b, device, repeats=7)  # type: ignore[misc]
        matmul[str(dtype).removeprefix("torch.")] = 2 * size**3 / us / 1e6
    return Ceilings(copy_gb_per_s=2 * _FLUSH_BYTES / copy_us / 1e3, matmul_tflop_per_s=matmul)
