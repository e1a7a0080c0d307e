"""The rows of `seamwise bench gpu`: JSON lines, written as soon as they are measured, resumed by key, within a time.

A row is {"key", "status", …}: "ok" with what was measured, "failed" with the error, "absent" with why it cannot be
measured here, "skipped" for want of time, "started" until one of these follows. Of rows with one key the last counts.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from seamwise.bench.timing import Row

T = TypeVar("T")


class Absent(Exception):
    """What was asked cannot be measured on this machine or with this version; the message says why."""


def read_rows(path: Path) -> tuple[Row, dict[str, Row]]:
    """Return a file's head and its rows by key. A last line that was cut short is left out.

    Raises ValueError naming the file when it is not such a file.
    """
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    try:
        head, *rows = map(json.loads, lines)
        return {"machine": dict(head["machine"]), "device": head["device"], "shapes": head["shapes"]}, {
            row["key"]: row for row in rows
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a file of `seamwise bench gpu`: {error!r}") from error


class Results:
    """A file of rows, open for more. Raises ValueError when it holds those of another commit, machine or shapes."""

    def __init__(self, path: Path, head: Row, resume: Path | None = None) -> None:
        self.path, self.rows = path, dict[str, Row]()
        if resume is not None and resume != path:
            if path.exists():
                raise ValueError(f"--json {path} exists; resume it, or choose another file")
            shutil.copyfile(resume, path)
        elif resume is None and path.exists():
            raise ValueError(f"--json {path} exists; give --resume {path} to go on with it, or choose another file")
        elif resume is not None and not path.exists():
            raise ValueError(f"--resume {resume} does not exist")
        if resume is None:
            self._write(head)
            return
        found, self.rows = read_rows(path)
        if different := [name for name in head if head[name] != found[name]]:
            name = different[0]
            raise ValueError(f"--resume {resume} was made with {name}={found[name]!r}, this run has {head[name]!r}")
        text = path.read_bytes()
        os.truncate(path, text.rfind(b"\n") + 1)

    def append(self, row: Row) -> None:
        """Add a row, on the disk when this returns."""
        self.rows[row["key"]] = row
        self._write(row)

    def _write(self, line: Row) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


@dataclass(kw_only=True)
class Context:
    """What a stage is given.

    until   the time.time() after which nothing may run
    extras  whether this is the second round: the first takes in every stage what a goal reads, the second the rest
    """

    device: str
    tiny: bool
    results: Results
    until: float
    extras: bool = False

    def take(
        self, key: str, estimate_s: float, measure: Callable[[], Row], *, extra: bool = False,
        limit_s: float | None = None,
    ) -> Iterator[Row]:  # fmt: skip
        """Yield the row of a measurement, unless it is there already; it starts only if its estimate fits.

        A row that takes longer than `limit_s` hangs; by default, than four times its estimate and half a minute.
        """
        if extra != self.extras or self.results.rows.get(key, {}).get("status") in ("ok", "absent", "failed"):
            return
        left_s = self.until - time.time()
        if estimate_s > left_s:
            reason = f"estimated {estimate_s:.0f} s, {max(left_s, 0):.0f} s were left"
            yield {"key": key, "status": "skipped", "reason": reason}
            return
        began = time.time()
        self.results.append({"key": key, "status": "started", "limit": began + (limit_s or 4 * estimate_s + 30)})
        row: Row = {"key": key, "status": "ok"}
        try:
            row |= measure()
        except Absent as why:
            row |= {"status": "absent", "reason": str(why)}
        except Exception as error:  # a failure is a result: the run goes on, and its exit status says so
            where = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{Path(where.filename).name}:{where.lineno}"
            row |= {"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000], "at": at}
        yield row | {"seconds": round(time.time() - began, 2)}


class Lazy(Generic[T]):
    """A value made when it is first asked for. A failure is raised at every call, without another attempt."""

    def __init__(self, make: Callable[[], T], estimate_s: float) -> None:
        self._make, self._estimate_s = make, estimate_s
        self._value: T | None = None
        self._error: Exception | None = None

    @property
    def pending_s(self) -> float:
        """How long the next call is estimated to take."""
        return self._estimate_s if self._value is None and self._error is None else 0.0

    def __call__(self) -> T:
        if isinstance(self._error, Absent):
            raise self._error
        if self._error is not None:
            raise RuntimeError(f"not loaded: {type(self._error).__name__}: {self._error}") from self._error
        if self._value is None:
            try:
                self._value = self._make()
            except Exception as error:
                self._error = error
                raise
        return self._value
