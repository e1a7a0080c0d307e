"""The roofline picture of a run of `seamwise bench kernels`: each kernel's arithmetic intensity against its FLOP/s.

Source: Williams, Waterman and Patterson 2009, https://doi.org/10.1145/1498765.1498785.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .command_line import picture
from .timing import Ceilings


def plot_roofline(rows: Sequence[dict[str, Any]], ceilings: Ceilings, dtype: str, path: Path) -> None:
    """Write a PNG. Raises ValueError when no row computes anything, RuntimeError without matplotlib."""
    shown = [row for row in rows if row["flops"]]
    if not shown:
        raise ValueError("nothing to draw: none of these kernels computes, choose others than copies")
    peak = ceilings.matmul_tflop_per_s.get(dtype, ceilings.matmul_tflop_per_s["bfloat16"])
    intensity = [row["flops"] / row["bytes"] for row in shown]
    low, high = min(*intensity, 0.1) / 2, max(*intensity, 2 * 1e3 * peak / ceilings.copy_gb_per_s) * 2
    ridge = 1e3 * peak / ceilings.copy_gb_per_s
    roof = [min(peak, x * ceilings.copy_gb_per_s / 1e3) for x in (low, ridge, high)]
    rates = f"{ceilings.copy_gb_per_s:.0f} GB/s, {peak:.2f} TFLOP/s"
    with picture(path, 10, 6) as axes:
        axes.loglog([low, ridge, high], roof, color="black", label=rates)
        for name in sorted({row["contract"] for row in shown}):
            at = [(x, row["tflop_per_s"]) for x, row in zip(intensity, shown, strict=True) if row["contract"] == name]
            axes.loglog(*zip(*at, strict=True), "o", label=name)
        axes.set(xlabel="arithmetic intensity, flop/byte", ylabel="TFLOP/s", title=f"Roofline, {dtype}")
        axes.legend(fontsize="small", ncols=2)
        axes.grid(visible=True, which="both", alpha=0.2)
