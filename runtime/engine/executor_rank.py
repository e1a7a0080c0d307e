"""One rank of a model in a process of its own: it answers steps and calls until its parent ends it."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seamwise.runtime.build.step import StepOutput
from seamwise.runtime.distributed.group import meet
from seamwise.runtime.kv.offload_options import open_store
from seamwise.runtime.kv.rank_stores import Served
from seamwise.runtime.runner.runner import ModelRunner

from .executor import Worker, call_worker, make_worker
from .executor_wire import from_frames


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStart:
    """What a rank is started with: where it meets the others and its parent, and what it loads.

    folder   of sockets, the meeting file, stacks and results, private to the parent
    stages   ranks are stages of a step: each has some of the layers
    timeout_s  of a collective: a rank that waits longer for another fails
    """

    rank: int
    ranks: int
    folder: Path
    timeout_s: float
    threads: int
    model: Path
    options: Mapping[str, Any]
    extension: str | type | None
    stages: bool = False

    @property
    def address(self) -> str:
        return f"ipc://{self.folder}/rank{self.rank}"

    @property
    def answers(self) -> str:
        return f"{self.address}.answers"

    @property
    def stacks(self) -> Path:
        """Where the rank writes its threads' stacks on SIGUSR1."""
        return self.folder / f"stacks{self.rank}"


class Shelf:
    """Results that the parent reads where the rank wrote them: one file in memory, valid until the next step."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._memory: dict[str, tuple[str, Tensor]] = {}

    def put(self, name: str, result: Tensor) -> tuple[str, str, tuple[int, ...]]:
        """Copy a tensor; return its file, dtype and shape."""
        path, held = self._memory.get(name, ("", None))
        if held is None or held.numel() < result.nbytes:
            self._count += 1
            path = str(self._folder / f"{name}{self._count}")
            held = torch.from_file(path, shared=True, size=max(2 * result.nbytes, 64), dtype=torch.uint8)
            self._memory[name] = path, held
        if result.numel():
            held[: result.nbytes].view(result.dtype).view(result.shape).copy_(result)
        return path, str(result.dtype).removeprefix("torch."), tuple(result.shape)


def main(start: RankStart) -> None:
    """Load, report, and serve; what goes wrong is an answer, with its traceback."""
    import zmq

    threading.Thread(target=_end_with_parent, args=(start.folder,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    faulthandler.register(signal.SIGUSR1, start.stacks.open("w"), all_threads=True)
    torch.set_num_threads(start.threads)
    sockets: list[Any] = [zmq.Context.instance().socket(zmq.PAIR) for _ in range(2)]
    asked, socket = sockets
    asked.connect(start.address)
    socket.connect(start.answers)

    def load() -> tuple[Worker, Any]:
        device = str(start.options.get("device", "auto"))
        meet(f"{start.folder}/meeting", start.rank, start.ranks, device, start.timeout_s)
        shared: dict[str, Any] = {"pipeline_parallel_size" if start.stages else "tensor_parallel_size": start.ranks}
        runner = ModelRunner.load(start.model, **shared, **start.options)
        worker = make_worker(runner, str(start.model), start.extension, start.rank)
        return worker, (runner.config, runner.options, runner.kv_spec, runner.startup_s, runner.program)

    answered, loaded = _attempt(load)
    socket.send_multipart(_answer(answered, loaded[1] if answered else loaded))
    if not answered:
        asked.close(0)
        socket.close(linger=5000)
        zmq.Context.instance().term()  # a process that ends takes what its socket has not sent with it
        return
    worker, shelf = loaded[0], Shelf(start.folder)
    step = Stage(worker, shelf, start.ranks) if start.stages else partial(_step, worker, shelf)
    while True:
        kind, *frames = asked.recv_multipart()
        if kind == b"step":
            answer = _attempt(lambda frames=frames: step(frames))
        elif kind == b"call":
            answer = _attempt(lambda frames=frames: call_worker(worker, *pickle.loads(frames[0])))
        else:
            return
        socket.send_multipart(_answer(*answer))


def _end_with_parent(folder: Path) -> None:
    """Wait for the end of the process that started this one, remove the folder that it would have, and end."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    shutil.rmtree(folder, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGKILL)


def serve_store(worker: Worker, address: str, **options: Any) -> tuple[str, bool]:
    """Open this rank's tiers of the KV cache, for whoever listens there; return what RankStores is told of them."""
    store = open_store(worker.model_runner, rank=worker.rank, **options)
    link = connection.Client(address, "AF_UNIX")
    link.send(worker.rank)
    served = Served(link, store)

    def serve() -> None:
        with contextlib.suppress(EOFError, OSError):  # whoever asked is gone
            while True:
                served.take(*link.recv())

    threading.Thread(target=serve, name="seamwise-kv", daemon=True).start()
    return store.layout, store.outlives


class Stage:
    """Steps of one stage: take from the one before, compute, give to the next; the last puts logits on the shelf.

    What is given on is sent while the next step is computed. Results stay until as many more steps as there are stages
    were begun.
    """

    def __init__(self, worker: Worker, shelf: Shelf, stages: int) -> None:
        self._worker, self._shelf, self._stages, self._count = worker, shelf, stages, 0
        self._sent: list[Any] = []

    def __call__(self, frames: list[bytes]) -> Any:
        import torch.distributed as dist

        batch, rank, runner = from_frames(frames), self._worker.rank, self._worker.model_runner
        carried = []
        for told in runner.program.carried:
            shape = [batch.num_tokens if size is None else size for size in told["shape"]]
            carried.append(torch.empty(shape, dtype=getattr(torch, told["dtype"]), device=runner.options.device))
            dist.recv(carried[-1], rank - 1)
        began = time.perf_counter()
        results = runner.step_stage(batch, carried)
        self._worker.trace.append((began, time.perf_counter()))
        for sent in self._sent:
            sent.wait()
        if rank + 1 < self._stages:
            self._sent = [dist.isend(result.contiguous(), rank + 1) for result in results]
            return None
        self._count += 1
        turn = self._count % (self._stages + 1)
        logits, *hidden = results
        wanted = self._shelf.put(f"hidden{turn}_", hidden[0]) if batch.hidden_states else None
        return self._shelf.put(f"logits{turn}_", logits), wanted


def _step(worker: Worker, shelf: Shelf, frames: list[bytes]) -> Any:
    output: StepOutput = worker.model_runner.step(from_frames(frames))
    if worker.rank:
        return None  # every rank has the same logits
    hidden = output.hidden_states
    return shelf.put("logits", output.logits), None if hidden is None else shelf.put("hidden", hidden)


def _attempt(function: Any) -> tuple[bool, Any]:
    try:
        return True, function()
    except Exception as error:
        return False, (type(error).__name__, str(error), traceback.format_exc())


def _answer(fine: bool, result: Any) -> list[bytes]:
    try:
        return [b"fine" if fine else b"error", pickle.dumps(result)]
    except Exception as error:  # a result that cannot travel is the caller's mistake, and no rank ends for it
        told = f"the result, a {type(result).__name__}, cannot be sent to another process: {error}"
        return [b"error", pickle.dumps(("ValueError", told, ""))]
