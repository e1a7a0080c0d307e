"""Write down what was planned from what, and plan it again: a recording replays to the same bytes.

A recording is a text file of JSON lines: the limits and the policy's name, then for each step its view and its plan.
Use: LLM(…, decisions_dir="DIR"), and later `seamwise replay FILE`, or `replay(path)`. No text and no token of a request
is written: lengths, blocks, names of prefixes (digests), times in tokens.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from seamwise.runtime.build.kv_groups import KVGroup

from .config import SchedulerConfig
from .plan import plan, shortlist
from .policies import find_policy
from .view import Candidate, Plan, Progress, Rows, View, frozen

logger = logging.getLogger("seamwise.scheduler")


class Recording:
    """A recorder of an engine: call it with each view and plan. Each step is in the file when it begins.

    A disk that takes no more ends the recording, with one error in the log, and not the engine.
    """

    def __init__(self, path: Path, config: SchedulerConfig) -> None:
        self._file = path.open("w", encoding="utf-8", buffering=1)
        self._file.write(encode(asdict(config)) + "\n")

    def __call__(self, view: View, plan: Plan) -> None:
        if self._file.closed:
            return
        try:
            self._file.write(f"{encode(view)}\t{encode(plan)}\n")
        except OSError as error:
            logger.error("decisions are not recorded any more: %s: %s", self._file.name, error)
            with suppress(OSError):  # what is left in the file's buffer
                self._file.close()

    def close(self) -> None:
        self._file.close()


def record_in(folder: str | Path, config: SchedulerConfig, rank: int | None = None) -> Recording:
    """Record in a new file of a folder, which is made; its name has the engine's rank, the time and the process.

    Raises ValueError for a folder that cannot be made or written.
    """
    engine = "" if rank is None else f"dp{rank}_"
    path = Path(folder) / f"{engine}decisions_{time.time_ns()}_{os.getpid()}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return Recording(path, config)
    except OSError as error:
        raise ValueError(f"decisions_dir={str(folder)!r}: wanted a folder that can be written: {error}") from error


def replay(path: Path) -> int:
    """Plan every step of a recording again; return how many there are. A last line that was cut short is left out.

    Raises ValueError naming the first step whose plan, or order of candidates, is not the recorded one.
    """
    with path.open(encoding="utf-8") as lines:
        config = _config(path, next(lines, ""))
        policy = find_policy(config.scheduling_policy)
        count = 0
        for count, line in enumerate(lines, start=1):
            if not line.endswith("\n"):
                return count - 1
            written, _, expected = line.rstrip("\n").partition("\t")
            try:
                view = decode_view(json.loads(written))
            except (KeyError, TypeError) as error:
                raise ValueError(f"{path}: step {count} is not that of a recording of this version: {error}") from error
            if (found := encode(plan(view, config, policy))) != expected:
                raise ValueError(f"{path}: step {count} was planned as {expected}, and is now planned as {found}")
            if view.candidates:
                before = [c.arrival for c in view.candidates]
                order = view.waiting.arrival[shortlist(view, policy, len(before))].tolist()
                if order != before:
                    raise ValueError(f"{path}: step {count} had candidates {before}, and now has {order}")
    return count


def _config(path: Path, line: str) -> SchedulerConfig:
    try:
        return SchedulerConfig(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: its first line is not the limits of a recording of this version: {error}") from error


def encode(value: Any) -> str:
    """Return a value's one JSON text."""
    return json.dumps(value, default=_plain, separators=(",", ":"))


def _plain(value: Any) -> Any:
    """Return what stands for a value that JSON has not: an array, a name or a record."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, bytes):
        return value.hex()
    return {f.name: getattr(value, f.name) for f in fields(value)}


def decode_view(raw: Mapping[str, Any]) -> View:
    """Return the view that was written."""
    candidates = tuple(
        Candidate(**{**c, "names": tuple(map(bytes.fromhex, c["names"])), "resting": tuple(c["resting"])})
        for c in raw["candidates"]
    )
    return View(**{
        **raw, "counters": _column(raw["counters"], float), "running": _rows(raw["running"]),
        "waiting": _rows(raw["waiting"]), "candidates": candidates,
        "shared": tuple((tuple(rows), blocks) for rows, blocks in raw["shared"]),
        "groups": tuple(KVGroup(**group) for group in raw["groups"]),
        "progress": Progress(**{name: _column(values, int) for name, values in raw["progress"].items()}),
    })  # fmt: skip


def _rows(raw: Mapping[str, Any]) -> Rows:
    return Rows(**{name: _column(values, float if name == "predicted" else int) for name, values in raw.items()})


def _column(values: list[Any], kind: type) -> np.ndarray:
    return frozen(np.array(values, dtype={int: np.int64, float: np.float64}[kind]))
