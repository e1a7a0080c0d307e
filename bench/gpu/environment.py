"""Stage 1 of `seamwise bench gpu`: the device as it is found, and the most it was seen to do."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial

import torch

from seamwise.bench.kernels import device_us
from seamwise.bench.timing import copy_rate, matmul_rate, read_rate

from .rows import Absent, Context, Row

_ASKED = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,power.draw,temperature.gpu,memory.used"


def rows(context: Context) -> Iterator[Row]:
    """Yield the device's state, bytes a second copied and read, bf16 and fp8 matrix products, and a launch's time."""
    megabytes, size = (16, 256) if context.tiny else (1024, 8192)
    yield from context.take("environment/device", 3, lambda: describe(context.device))
    ceilings: dict[str, Callable[[], Row]] = {
        "copy": partial(copy_rate, context.device, megabytes << 20),
        "read": partial(read_rate, context.device, megabytes << 20),
        "bf16": partial(matmul_rate, context.device, size, torch.bfloat16),
        "fp8": partial(float8_rate, context.device, size),
        "launch": partial(launch_time, context.device),
    }
    for name, measure in ceilings.items():
        yield from context.take(f"environment/{name}", 3, measure)


def describe(device: str) -> Row:
    """Return capability, memory and, of nvidia-smi, driver, clocks and power as they are."""
    if device == "cpu":
        return {"threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(0)
    found: Row = {
        "capability": f"{properties.major}.{properties.minor}", "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count, "cuda": torch.version.cuda,
    }  # fmt: skip
    if shutil.which("nvidia-smi") is None:
        return found | {"nvidia_smi": "not installed: driver, clocks and power cap are unknown"}
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={_ASKED}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    return found | dict(zip(_ASKED.split(","), map(str.strip, answer.split(",")), strict=True))


def float8_rate(device: str, size: int) -> Row:
    """Multiply float8 matrices. Raises Absent where the device has none."""
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        raise Absent("float8 needs compute capability 8.9")
    return matmul_rate(device, size, torch.float8_e4m3fn)


def launch_time(device: str) -> Row:
    """Copy 4 bytes, timed as kernels are: what a launch costs before anything is moved."""
    source = torch.zeros(1, device=device)
    sink = torch.empty_like(source)
    us, spread_us, _ = device_us(lambda: sink.copy_(source), device)
    return {"us": us, "spread_us": spread_us}
