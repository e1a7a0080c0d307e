"""How many cores this process may use: those it may run on, and what its control groups grant of them.

A thread more than that waits for the others' time at every kernel: with a quota of one core, two threads are stopped
in turns. Sources: cpu.max, https://docs.kernel.org/admin-guide/cgroup-v2.html; cpu.cfs_quota_us,
https://docs.kernel.org/scheduler/sched-bwc.html.
"""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

import torch

_LOG = logging.getLogger(__name__)
_GROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available() -> int:
    """Return the number of cores, at least one; a quota of a part of a core counts as one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    granted = quota(_GROUPS, _MEMBERSHIP.read_text() if _MEMBERSHIP.exists() else "")
    return max(1, allowed if granted is None else min(allowed, math.ceil(granted)))


def quota(groups: Path, membership: str) -> float | None:
    """Return the least quota, in cores, of the control groups named by `membership` (the text of /proc/self/cgroup) and
    of their parents under `groups`; None where there is no limit. Both versions of control groups are read."""
    granted = []
    for line in membership.splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        roots = [groups] if number == "0" else [groups / controllers, groups / "cpu"]
        for root in roots:
            place = root / path.lstrip("/")
            while place.is_relative_to(root):
                granted += _read(place)
                place = place.parent
    return min(granted, default=None)


def _read(place: Path) -> list[float]:
    try:
        if (place / "cpu.max").exists():
            most, period = (place / "cpu.max").read_text().split()
        else:
            most, period = ((place / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    except OSError:  # a group without this controller, or one that may not be read: it grants what its parent does
        return []
    return [] if most == "max" or int(most) <= 0 else [int(most) / int(period)]


def limit_threads() -> None:
    """Have torch use no more threads than there are cores; a smaller number that was asked for stays."""
    before, most = torch.get_num_threads(), available()
    if before > most:
        _LOG.info("%d threads instead of %d: this process may use %d cores", most, before, most)
        torch.set_num_threads(most)
