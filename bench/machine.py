"""What a result must name to be comparable: device, instruction set, threads, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from seamwise.kernels.cpu import cpp


def label(device: str = "cpu") -> str:
    """Return what marks figures and results files: a CPU's instructions, as "avx2"; else the device."""
    return cpp.instructions() if device == "cpu" else device


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return the device that was measured, the threads, the versions, and the commit with "-dirty" where it was."""
    import triton

    git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent, check=False).stdout
    except FileNotFoundError:  # no git on this machine: `--commit` says it
        found = ""
    commit = found.strip()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        **({"instruction_set": label()} if device == "cpu" else {}),
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
