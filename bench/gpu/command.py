"""`seamwise bench gpu`: environment, correctness, kernels, steps, whole runs and a DeepSeek-R1 rank, in one command.

It keeps to the minutes given: first what the goals read, stage by stage, then the rest; a row starts only if its
estimate fits. Rows are measured in a process of its own, which is started again when the device or the process is
lost, or when a row hangs; such a row has then failed. `--resume` goes on where a run was cut.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from seamwise.bench.machine import machine

from .goals import print_goals
from .rows import Context, Results, Row, read_rows
from .runs import free_memory

STAGES = ("environment", "correctness", "kernels", "steps", "runs", "deepseek")
_LOST = 3  # exit status of a worker whose device answers no more
# The worker, by its name also where this module was started as __main__.
_WORKER = "import sys; from seamwise.bench.gpu.command import main; sys.exit(main(sys.argv[1:]))"
_GRACE_S = 20.0  # what a row may take beyond the minutes given before it is cut


def measure(context: Context, stages: list[str]) -> int:
    """Take the rows of the stages in both rounds. Returns 0, or _LOST when the device is lost."""
    for context.extras in (False, True):
        for stage in stages:
            for row in importlib.import_module(f"seamwise.bench.gpu.{stage}").rows(context):
                context.results.append(row)
                print_row(row)
                if row["status"] == "failed" and device_is_lost(context.device):
                    return _LOST
            try:
                free_memory(context.device)
            except RuntimeError as error:  # what a failed capture leaves behind makes freeing fail: begin afresh
                print(f"the device's memory cannot be freed any more: {error}", flush=True)
                return _LOST
    return 0


def device_is_lost(device: str) -> bool:
    """Return whether an earlier error makes every further call fail: an illegal address, or a capture left open."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def print_row(row: Row) -> None:
    """Print a row as one line."""
    shown = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items() if k not in _QUIET)
    print(f"{row['status']:7} {row['key']:60} {'  '.join(shown)}"[:240], flush=True)


_QUIET = {"key", "status", "kernels_us", "failed_tests"}


def supervise(command: list[str], path: Path, until: float) -> int:
    """Run the worker until it is done, and start it again after a row that lost it; that row has failed.

    A row that is cut because the time is over may be measured by a later run. Returns the worker's exit status.
    """
    _settle(path, "skipped", reason="an earlier run was cut here")
    while True:
        worker = subprocess.Popen(command, start_new_session=True)  # with what it starts, one group to end
        try:
            while worker.poll() is None:
                time.sleep(0.2)
                if time.time() > until + _GRACE_S or any(time.time() > row["limit"] for row in _started(path)):
                    break
        finally:  # of a worker that ended, too: tests that it had started may run on
            _end_group(worker)
        if time.time() > until + _GRACE_S:
            _settle(path, "skipped", reason="the time was over")
            return 0
        error = f"the process was lost, with status {worker.returncode}, or killed because it hung"
        if not _settle(path, "failed", error=error) and worker.returncode != _LOST:
            return worker.returncode  # done; or no row is to blame, and another attempt would end the same way


def _end_group(worker: subprocess.Popen[bytes]) -> None:
    """Kill a worker and all that it started, and wait for it."""
    with contextlib.suppress(ProcessLookupError):  # nothing of it is left
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def _settle(path: Path, status: str, **why: str) -> int:
    """Give the row that was under way a status; return how many there were, 0 or 1."""
    under_way = _started(path)
    for row in under_way:
        Results(path, read_rows(path)[0], resume=path).append({"key": row["key"], "status": status, **why})
    return len(under_way)


def _started(path: Path) -> list[Row]:
    return [row for row in read_rows(path)[1].values() if row["status"] == "started"]


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="seamwise bench gpu", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where rows are written, a line each")
    parser.add_argument("--minutes", type=float, default=9.0, help="what the whole run may take (default 9)")
    parser.add_argument("--resume", type=Path, help="an earlier file: measure what it lacks")
    parser.add_argument("--retry", action="store_true", help="with --resume: measure again what failed")
    parser.add_argument("--only", help=f"stages, comma-separated, in this order: {', '.join(STAGES)}")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shapes", choices=["real", "tiny"], default="real", help="tiny: every stage in seconds")
    parser.add_argument("--commit", help="the commit of a tree that is no git checkout; refused in a checkout")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # the worker's: when the run ends
    options = parser.parse_args(arguments)
    options.stages = options.only.split(",") if options.only else list(STAGES)
    if unknown := [s for s in options.stages if s not in STAGES]:
        raise ValueError(f"--only: no stage {unknown[0]!r}; there are: {', '.join(STAGES)}")
    if "environment" not in options.stages:
        options.stages.insert(0, "environment")  # every other number is read beside its ceilings
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device; try --device cpu --shapes tiny")
    if options.retry and not options.resume:
        raise ValueError("--retry belongs to --resume")
    return options


def _head(options: argparse.Namespace) -> Row:
    found = machine(options.device)
    if options.commit:
        if found["commit"] != "unknown":
            raise ValueError(f"--commit: this is a git checkout, at {found['commit']}; leave the option out")
        if not re.fullmatch(r"[0-9a-f]{40}", options.commit):
            raise ValueError(f"--commit {options.commit}: wanted the 40 hexadecimal digits of a commit")
        found["commit"] = options.commit
    return {"machine": found, "device": options.device, "shapes": options.shapes}


def main(arguments: list[str]) -> int:
    """Measure, print every row and the goals. Returns 1 when a row has failed, 0 otherwise."""
    options = _parse(arguments)
    until = options.until or time.time() + 60 * options.minutes
    if options.until:
        results = Results(options.json, _head(options), resume=options.json)
        work = Context(device=options.device, tiny=options.shapes == "tiny", results=results, until=until)
        return measure(work, options.stages)
    results = Results(options.json, _head(options), options.resume)
    for row in [r for r in results.rows.values() if options.retry and r["status"] == "failed"]:
        results.append({"key": row["key"], "status": "skipped", "reason": f"to be measured again: {row['error']}"})
    command = [sys.executable, "-P", "-c", _WORKER, "--json", str(options.json), "--resume", str(options.json)]
    command += ["--only", ",".join(options.stages), "--device", options.device, "--shapes", options.shapes]
    command += ["--until", str(until), *(["--commit", options.commit] if options.commit else [])]
    status = supervise(command, options.json, until)
    _, rows = read_rows(options.json)
    print_goals(rows)
    return int(status != 0 or any(row["status"] == "failed" for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
