"""How much memory there is, and how much is free: of the device, or of what a container may take of the machine.

Sources: https://docs.kernel.org/admin-guide/cgroup-v2.html (memory.max, memory.current),
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html, https://man7.org/linux/man-pages/man5/proc_meminfo.5.html
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

_FILES = (  # limit, usage and the statistics that name page cache, of a control group: version 2, version 1
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def total_bytes(device: str = "cpu", root: Path = Path("/")) -> int:
    """Return the device's memory; of the CPU's, what this process's control groups let it take."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *(limit for limit, _ in _groups(root))])


def free_bytes(device: str = "cpu", root: Path = Path("/")) -> int:
    """Return how much more may be taken: of the machine's and of each control group's, the least."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = dict(line.split(":", 1) for line in _read(root / "proc/meminfo").splitlines() if ":" in line)
    available = meminfo.get("MemAvailable", "").split()
    machine = 1024 * int(available[0]) if available else total_bytes(device, root)
    return max(0, min([machine, *(limit - used for limit, used in _groups(root))]))


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """Yield the memory limit and usage in bytes of this process's control groups and all above them that have one.

    Page cache that a group holds is not counted as used: it is given up when memory is wanted.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory") and "memory" not in kinds.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("memory" if kinds else "")
        inner = Path(path.lstrip("/"))
        for folder in (mount / p for p in (inner, *inner.parents)):  # in a container, its own group is the mount's top
            for limit_name, usage_name in _FILES:
                limit, used = _read(folder / limit_name).strip(), _read(folder / usage_name).strip()
                if limit.isdigit() and used.isdigit():
                    yield int(limit), max(0, int(used) - _page_cache(folder))


def _page_cache(folder: Path) -> int:
    stat = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
    return sum(int(stat[name]) for name in ("inactive_file", "active_file") if stat.get(name, "").isdigit())


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # no such kind of control group, or not Linux
        return ""
