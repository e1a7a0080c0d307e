"""Stage 1 of `seamwise bench gpu`: the device as it is found, and the most it was seen to do."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator

import torch

from .gpu_rows import Absent, Context, Row
from .timing import median_us

_ASKED = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,power.draw,temperature.gpu,memory.used"


def rows(context: Context) -> Iterator[Row]:
    """Yield the device's state, then bytes a second copied and read, and bf16 and fp8 matrix products."""
    megabytes, size = (16, 256) if context.tiny else (1024, 8192)
    yield from context.take("environment/device", 3, lambda: describe(context.device))
    ceilings: dict[str, Callable[[], Row]] = {
        "copy": lambda: copy_ceiling(context.device, megabytes << 20),
        "read": lambda: read_ceiling(context.device, megabytes << 20),
        "bf16": lambda: matmul_ceiling(context.device, size),
        "fp8": lambda: float8_ceiling(context.device, size),
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


def copy_ceiling(device: str, num_bytes: int) -> Row:
    """Copy random bytes; GB/s counts bytes read and written."""
    source = torch.randint(256, (num_bytes,), dtype=torch.uint8, device=device)
    sink = torch.empty_like(source)
    us, spread_us = median_us(lambda: sink.copy_(source), device)
    return {"gb_per_s": 2 * num_bytes / us / 1e3, "us": us, "spread_us": spread_us}


def read_ceiling(device: str, num_bytes: int) -> Row:
    """Read random numbers: the faster of a sum and a maximum."""
    values = torch.rand(num_bytes // 4, device=device)
    us, spread_us = min(median_us(call, device) for call in (values.sum, values.max))
    return {"gb_per_s": values.nbytes / us / 1e3, "us": us, "spread_us": spread_us}


def matmul_ceiling(device: str, size: int) -> Row:
    """Multiply square bfloat16 matrices of random numbers."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    us, spread_us = median_us(lambda: a @ b, device, repeats=9)
    return {"tflop_per_s": 2 * size**3 / us / 1e6, "us": us, "spread_us": spread_us}


def float8_ceiling(device: str, size: int) -> Row:
    """Multiply square float8_e4m3fn matrices, scaled by row and by column, into bfloat16."""
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        raise Absent("float8 needs compute capability 8.9")
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    rows, columns = torch.ones(size, 1, device=device), torch.ones(1, size, device=device)
    us, spread_us = median_us(
        lambda: torch._scaled_mm(a, b.T, rows, columns, out_dtype=torch.bfloat16), device, repeats=9
    )
    return {"tflop_per_s": 2 * size**3 / us / 1e6, "us": us, "spread_us": spread_us}
