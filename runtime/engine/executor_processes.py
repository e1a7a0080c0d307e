"""One process a rank on this machine, and one scheduler, here: every rank is sent a step, one rank's logits are read.

Where ranks are stages of a step (pipeline_parallel_size), several steps may be begun before the first is finished: a
stage takes the next one as soon as it has given on the last. It stands for a runner, so that an engine drives it as
one. A rank that dies or hangs is an error of every call from then on, the cause in its first line, and all ranks are
ended: without one, the others would wait for it.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing import connection
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from seamwise.extras import pip_install
from seamwise.runtime.build.kv_groups import Groups
from seamwise.runtime.build.step import StepInput, StepOutput
from seamwise.runtime.kv.rank_stores import RankStores
from seamwise.runtime.runner.adapter_slots import AdapterSites, NotWritten
from seamwise.runtime.runner.memory_plan import MemoryPlan
from seamwise.runtime.weights.read_adapter import Adapter

from .executor_rank import RankStart, main, serve_store
from .executor_wire import to_frames

_GRACE_S = 5.0  # after one rank's error the others, who may wait for it, answer within so long or count as lost
_END_S = 1.0  # within which a process that makes others fail has ended, and what one said that ended has come
_ERRORS: dict[str, type[Exception]] = {"ValueError": ValueError}  # a caller's mistake stays one


class RankProcesses:
    """`ranks` processes that share a model, by the same protocol as one runner.

    stages     ranks have layers each, one behind the other, and no part of every layer
    timeout_s  of a step or a call; loading may take start_timeout_s
    """

    def __init__(
        self, model: Path, ranks: int, options: Mapping[str, Any], *, extension: str | type | None = None,
        stages: bool = False, timeout_s: float = 300.0, start_timeout_s: float = 1800.0,
    ) -> None:  # fmt: skip
        try:
            import zmq
        except ImportError as error:
            raise ValueError(
                f"{'pipeline' if stages else 'tensor'}_parallel_size={ranks} from one process needs pyzmq and msgspec:"
                f" {pip_install('serve')}{'' if stages else f', or start {ranks} processes with torchrun'}"
            ) from error
        self.timeout_s, self._lock, self._dead = timeout_s, threading.Lock(), ""
        self._answering, self._begun = threading.Lock(), deque[StepInput]()
        self._ended = threading.Condition(self._lock)
        memory = Path("/dev/shm")
        self._folder = Path(tempfile.mkdtemp(prefix="seamwise-", dir=memory if memory.is_dir() else None))
        context, spawn = zmq.Context(), multiprocessing.get_context("spawn")
        self._sockets: list[Any] = []
        self._asking: list[Any] = []  # a socket is one thread's at a time: steps are begun while others are waited for
        self._processes: list[Any] = []
        self._starts: list[RankStart] = []
        self._files: dict[str, Tensor] = {}
        ends = self._processes, (self._asking, self._sockets), context, self._folder
        self._end = weakref.finalize(self, _end, *ends)
        for rank in range(ranks):
            start = RankStart(
                rank=rank, ranks=ranks, folder=self._folder, timeout_s=timeout_s, model=model, options=options,
                threads=max(1, torch.get_num_threads() // ranks), extension=extension, stages=stages,
            )  # fmt: skip
            for sockets, address in ((self._asking, start.address), (self._sockets, start.answers)):
                sockets.append(context.socket(zmq.PAIR))
                sockets[-1].setsockopt(zmq.LINGER, 0)
                sockets[-1].bind(address)
            process = spawn.Process(target=main, args=(start,), name=f"seamwise-rank{rank}", daemon=True)
            process.start()
            self._processes.append(process)
            self._starts.append(start)
        ready = self._answers("start", start_timeout_s)
        self.config, self.options, self.kv_spec, self.startup_s, self.program = ready[0]
        self.kv_spec = max((each[2] for each in ready), key=lambda spec: spec.bytes_per_block)  # of most layers
        self.num_blocks = 0
        self._updates: int | None = 0
        self.adapters = AdapterSites(self.program)

    @property
    def block_size(self) -> int:
        return int(self.options.block_size)

    @property
    def kv_groups(self) -> Groups:
        """What each group of layers reads of a request's past."""
        return self.kv_spec.needs(self.options.max_model_len)

    def step(self, batch: StepInput) -> StepOutput:
        """Compute one step on every rank; the logits are valid until the next.

        Raises ValueError for a step that no rank takes; RuntimeError when a rank failed, died or did not answer.
        """
        self.begin(batch)
        return self.finish()

    def begin(self, batch: StepInput) -> None:
        """Send a step to every rank, behind those that are not finished; see `step` for what is raised."""
        batch.check()
        with self._lock:
            self._tell([b"step", *to_frames(batch)])
            self._begun.append(batch)

    def finish(self) -> StepOutput:
        """Wait for the earliest step that was begun; its logits are valid while fewer than all ranks end later ones."""
        try:
            answers = self._answers("step", self.timeout_s)
        finally:
            with self._lock:
                batch = self._begun.popleft()
                self._ended.notify_all()
        logits, hidden = next(answer for answer in answers if answer is not None)
        return StepOutput(
            logits=self._read(*logits), hidden_states=None if hidden is None else self._read(*hidden),
            request_slots=batch.request_slots, request_generations=batch.request_generations,
        )  # fmt: skip

    def collective_rpc(
        self, method: str | Callable[..., Any], timeout: float | None = None, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:  # fmt: skip
        """Call a method of every rank's worker, or a function that can be imported; return the results by rank.

        Raises ValueError where every rank says so, or what is given cannot be sent; RuntimeError as `step` does.
        """
        given = tuple(list(arg) if isinstance(arg, Iterator) else arg for arg in args)  # of weights, say
        try:
            message = pickle.dumps((method, given, dict(kwargs or {})))
        except Exception as error:
            raise ValueError(f"collective_rpc: {method!r} or its arguments cannot be sent to ranks: {error}") from error
        with self._lock:
            self._ended.wait_for(lambda: not self._begun)
            if method != "weight_state":
                self._updates = None  # whatever is called may write weights
            self._tell([b"call", message])
            return self._answers(f"collective_rpc({method!r})", timeout or self.timeout_s)

    def plan(self, budget: int | None = None, **limits: Any) -> MemoryPlan:
        """Return the plan of the rank that has room for the fewest blocks; see ModelRunner.plan."""
        plans: list[MemoryPlan] = self.collective_rpc("plan", None, (budget,), limits)
        return min(plans, key=lambda plan: plan.num_blocks)

    def limit_model_len(self, max_model_len: int) -> None:
        """Let requests be at most so long, on every rank."""
        self.collective_rpc("limit_model_len", None, (max_model_len,))
        self.options = replace(self.options, max_model_len=max_model_len)

    def allocate_kv(self, num_blocks: int) -> None:
        """Allocate every rank's part of the KV cache."""
        self.collective_rpc("allocate_kv", None, (num_blocks,))
        self.num_blocks = num_blocks

    def open_stores(self, **options: Any) -> RankStores:
        """Let each rank have tiers behind its part of the KV cache; options: open_store's."""
        address, ranks = f"{self._folder}/kv", len(self._processes)
        with connection.Listener(address, "AF_UNIX", backlog=ranks) as listener:
            told = self.collective_rpc(serve_store, None, (address,), {"num_ranks": ranks, **options})
            links = [listener.accept() for _ in range(ranks)]
        layouts, outlives = zip(*told, strict=True)
        stores = RankStores(sorted(links, key=lambda link: link.recv()), layouts, outlives[0])
        threading.Thread(target=stores.listen, name="seamwise-kv", daemon=True).start()
        stores.wait(written=False)  # by then ranks have said what their folders hold
        return stores

    def check_adapter(self, adapter: Adapter) -> None:
        """Raise ValueError for an adapter that does not fit; see ModelRunner.check_adapter."""
        self.adapters.check(adapter)

    def set_adapter(self, slot: int, adapter: Adapter | None) -> None:
        """Let every rank put its part of an adapter into a slot, or empty it.

        Raises NotWritten where any rank cannot: the slot is empty on all of them then.
        """
        failed = []
        if adapter is not None:
            reasons = self.collective_rpc("try_adapter", None, (slot, adapter))
            failed = [f"rank {rank}: {why}" for rank, why in enumerate(reasons) if why is not None]
        if adapter is None or failed:
            self.collective_rpc("set_adapter", None, (slot, None))
        if failed:
            raise NotWritten("; ".join(failed))

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of a block of the KV cache on the rank that has most of it."""
        return self.kv_spec.bytes_per_block

    @property
    def num_weight_updates(self) -> int:
        """How often weights were written."""
        if self._updates is None:
            state = self.collective_rpc("weight_state")
            self._updates = sum(updates for _, _, updates in state)
        return self._updates

    def weights_digest(self) -> str:
        """Return what names the weights of all ranks."""
        return " ".join(self.collective_rpc("weights_digest"))

    def shutdown(self) -> None:
        """End every rank. A second call does nothing."""
        self._dead = self._dead or "the ranks were shut down"
        self._end()

    def _tell(self, message: Sequence[bytes | memoryview]) -> None:
        import zmq

        if self._dead:
            raise RuntimeError(self._dead)
        try:
            for process, socket in zip(self._processes, self._asking, strict=True):
                while not socket.poll(20, zmq.POLLOUT):  # a send would block for ever where the rank is gone
                    if not process.is_alive():
                        break  # whoever waits for its answer says so
                else:
                    socket.send_multipart(message)
        except Exception as error:  # a thread that waited for an answer has ended the ranks
            raise RuntimeError(self._dead or str(error)) from error

    def _answers(self, what: str, timeout_s: float) -> list[Any]:
        """Return every rank's answer, or end them all and raise; an error that all ranks gave leaves them running."""
        with self._answering:
            return self._gathered(what, timeout_s)

    def _gathered(self, what: str, timeout_s: float) -> list[Any]:
        if self._dead:
            raise RuntimeError(self._dead)
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout_s
        while waiting := [rank for rank in range(len(self._sockets)) if rank not in answers]:
            for rank in waiting:
                if self._sockets[rank].poll(20):
                    kind, payload = self._sockets[rank].recv_multipart()
                    answers[rank] = kind == b"fine", pickle.loads(payload)
                    if kind != b"fine":
                        deadline = min(deadline, time.monotonic() + _GRACE_S)
            waiting = [rank for rank in waiting if rank not in answers]
            dead = [rank for rank in waiting if not self._processes[rank].is_alive()]
            silent = any(not self._sockets[rank].poll(1000 * _END_S) for rank in dead)
            if silent or (waiting and time.monotonic() > deadline):
                self._fail(what, answers, timeout_s)
        errors = [result for _, (fine, result) in sorted(answers.items()) if not fine]
        if not errors:
            return [answers[rank][1] for rank in range(len(answers))]
        if len(errors) < len(answers) or what == "start":
            self._fail(what, answers, timeout_s)
        name, text, trace = errors[0]
        raise _ERRORS.get(name, RuntimeError)(text if name in _ERRORS else f"{text}\n{trace}")

    def _fail(self, what: str, answers: Mapping[int, tuple[bool, Any]], timeout_s: float) -> NoReturn:
        """End all ranks, and raise with the first cause first.

        A process that ended makes others fail, who waited for it; an error of one makes others silent.
        """
        failed = {rank: result for rank, (fine, result) in sorted(answers.items()) if not fine}
        others = [rank for rank in range(len(self._processes)) if rank not in failed]
        if others:  # a rank may hear of another's end before its parent does
            connection.wait([self._processes[rank].sentinel for rank in others], _END_S)
        ended = [rank for rank in others if not self._processes[rank].is_alive()]
        causes = [", ".join(map(self._death, ended))] if ended else []
        causes += [f"rank {rank} failed: {name}: {text}\n{trace}" for rank, (name, text, trace) in failed.items()]
        if not ended and (silent := [rank for rank in others if rank not in answers]):
            within = f"{_GRACE_S:g} s of that" if failed else f"{timeout_s:g} s"
            causes.append(f"rank {', '.join(map(str, silent))} did not answer within {within}\n{self._stacks(silent)}")
        self._dead = f"{what}: " + "\n".join(causes).rstrip()
        self._end()
        raise RuntimeError(self._dead)

    def _death(self, rank: int) -> str:
        code = self._processes[rank].exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return f"rank {rank} (process {self._processes[rank].pid}) died: {how}"

    def _stacks(self, ranks: Sequence[int]) -> str:
        """Return what silent ranks are at, as they write it on a signal."""
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        return "".join(f"\nrank {rank} is at:\n{self._starts[rank].stacks.read_text()[:4000]}" for rank in ranks)

    def _read(self, path: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
        kind = getattr(torch, dtype)
        size = kind.itemsize * torch.Size(shape).numel()
        if path not in self._files:
            self._files[path] = torch.from_file(path, shared=True, size=Path(path).stat().st_size, dtype=torch.uint8)
        return self._files[path][:size].view(kind).view(shape)


def _end(processes: list[Any], sockets: tuple[list[Any], ...], context: Any, folder: Path) -> None:
    """Kill what still runs: a rank may be stuck in a collective, where no message reaches it."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join(5)
    for socket in itertools.chain(*sockets):
        socket.close()
    context.term()
    shutil.rmtree(folder, ignore_errors=True)
