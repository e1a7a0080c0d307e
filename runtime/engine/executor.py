"""Where steps are computed: `Executor.step(StepInput) -> StepOutput` is the only way, in this process or in others.

A worker is a rank's runner with the names that trainers know from vLLM's: `worker.model_runner.model.load_weights`,
`.model_config`, `.device`, `.rank`. `collective_rpc` calls a method of every worker; a class of one's own
(`worker_extension_cls`) adds methods to them.
"""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from seamwise.runtime.build.step import StepInput, StepOutput
from seamwise.runtime.runner.adapter_slots import NotWritten
from seamwise.runtime.runner.profile import ProfilerConfig, start_profile, stop_profile
from seamwise.runtime.runner.runner import ModelRunner
from seamwise.runtime.weights.read_adapter import Adapter


class Executor(Protocol):
    """Computes the steps of one engine on one or more ranks."""

    def step(self, batch: StepInput) -> StepOutput:
        """Compute one step on every rank. Raises RuntimeError, naming the cause first, when a rank is lost."""

    def collective_rpc(
        self, method: str | Callable[..., Any], timeout: float | None = None, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:  # fmt: skip
        """Call a method of every rank's worker, or a function on it; return the results by rank."""

    def shutdown(self) -> None:
        """End what was started. A second call does nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerModelConfig:
    """What a worker's extension may ask of the model, by vLLM's names."""

    model: str
    dtype: torch.dtype
    max_model_len: int
    hf_config: Mapping[str, Any]


class Worker:
    """One rank: its runner, and what extensions and `collective_rpc` reach.

    trace  when each of the last steps of a stage began and ended, seconds of the machine's monotonic clock
    """

    def __init__(self, runner: ModelRunner, model: str, rank: int = 0) -> None:
        self.model_runner = runner
        self.device = torch.device(runner.options.device)
        self.rank = self.local_rank = rank
        self.trace: deque[tuple[float, float]] = deque(maxlen=1024)
        self._model = model

    @property
    def model_config(self) -> WorkerModelConfig:
        """The model as it is now: max_model_len is what the plan affords once that is known."""
        options, raw = self.model_runner.options, self.model_runner.config.raw
        return WorkerModelConfig(
            model=self._model, dtype=options.dtype, max_model_len=options.max_model_len, hf_config=raw
        )

    def load_weights(self, weights: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Write new values of parameters; see ModelRunner.update_weights."""
        self.model_runner.update_weights(weights)

    def try_adapter(self, slot: int, adapter: Adapter) -> str | None:
        """Put an adapter into a slot; return why this rank could not, as no other rank is to be lost for it."""
        try:
            self.model_runner.set_adapter(slot, adapter)
        except NotWritten as error:
            return str(error)
        return None

    def weight_state(self) -> tuple[str, frozenset[str], int]:
        """Return the version of this rank's weights, what is asleep, and how often weights were written."""
        return self.model_runner.weight_version, self.model_runner.asleep, self.model_runner.num_weight_updates

    def start_profile(self, config: ProfilerConfig, prefix: str) -> None:
        """Record what this rank's process does, as prefix_rank0 or rank0; see runtime/runner/profile.py."""
        start_profile(config, "_".join(filter(None, (prefix, f"rank{self.rank}"))))

    def stop_profile(self) -> None:
        """End the profile and write it."""
        stop_profile()


def make_worker(runner: ModelRunner, model: str, extension: str | type | None = None, rank: int = 0) -> Worker:
    """Return a worker, with the methods of `extension` (a class, or "package.module.Class") added to it.

    Raises ValueError for an extension that cannot be imported, or that redefines what a worker has.
    """
    if extension is None:
        return Worker(runner, model, rank)
    if isinstance(extension, str):
        module, _, name = extension.rpartition(".")
        try:
            extension = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"worker_extension_cls={extension!r}: {error}; wanted an importable 'package.module.Class'"
            ) from error
    if not isinstance(extension, type):
        raise ValueError(f"worker_extension_cls={extension!r}: wanted a class or 'package.module.Class'")
    if taken := [name for name in vars(extension) if not name.startswith("__") and hasattr(Worker, name)]:
        raise ValueError(
            f"worker_extension_cls={extension.__name__}: a worker has {', '.join(taken)} of its own; rename"
        )
    made: Worker = type("Worker", (extension, Worker), {})(runner, model, rank)
    return made


def call_worker(
    worker: Worker, method: str | Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Call a worker's method by name, its runner's where it has none, or a function that takes the worker first.

    Raises ValueError for a name that neither has.
    """
    if callable(method):
        return method(worker, *args, **kwargs)
    found = getattr(worker, method, None) or getattr(worker.model_runner, method, None)
    if method.startswith("_") or not callable(found):
        raise ValueError(f"collective_rpc: workers have no method {method!r}; add it by worker_extension_cls")
    return found(*args, **kwargs)


class InProcess:
    """The executor of one rank, in the process that decides: a step is a call."""

    def __init__(self, runner: ModelRunner, model: str, extension: str | type | None = None) -> None:
        rank = 0 if runner.options.pipeline.parallel is None else runner.options.pipeline.parallel.rank
        self.driver_worker = make_worker(runner, model, extension, rank)
        self.step = runner.step

    def collective_rpc(
        self, method: str | Callable[..., Any], timeout: float | None = None, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:  # fmt: skip
        """Call a method of this process's worker. Raises ValueError for a timeout: a call cannot be left half way."""
        if timeout is not None:
            raise ValueError(f"collective_rpc: timeout={timeout}; a call in this process cannot be ended, leave it out")
        return [call_worker(self.driver_worker, method, args, kwargs or {})]

    def shutdown(self) -> None:
        """There is nothing to end."""


def starts_engines(size: int, rank: int | None, experts: bool) -> str:
    """Return how data_parallel_size engines come about: "start" them, this is one that was "started", it "joined" ranks
    that share out experts, or there is "one". One that was started takes its share of the threads.

    Raises ValueError for a size or rank that is none.
    """
    import torch.distributed as dist

    if type(size) is not int or size < 1:
        raise ValueError(f"data_parallel_size={size!r}: wanted a whole number of at least 1")
    if rank is not None:
        if type(rank) is not int or not 0 <= rank < size:
            raise ValueError(f"data_parallel_rank={rank!r}: wanted 0 to data_parallel_size - 1 = {size - 1}")
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
        return "joined" if experts else "started"
    if size == 1:
        return "one"
    if dist.is_initialized() or dist.is_torchelastic_launched():
        return "joined"
    return "start"


def starts_ranks(backend: str | None, ranks: int) -> bool:
    """Return whether an engine starts a process for each rank, by vLLM's distributed_executor_backend.

    Raises ValueError for another backend, or one that does not go with the number of ranks.
    """
    import torch.distributed as dist

    if backend not in (None, "uni", "mp", "external_launcher"):
        raise ValueError(
            f"distributed_executor_backend={backend!r}: wanted 'mp' (a process for each rank), 'uni' (this one alone)"
            " or 'external_launcher' (torchrun started as many as share the model)"
        )
    if ranks == 1:
        if backend == "mp":
            raise ValueError(
                "distributed_executor_backend='mp' needs tensor_parallel_size or pipeline_parallel_size above 1;"
                " leave it out"
            )
        return False
    if backend == "uni":
        raise ValueError(f"distributed_executor_backend='uni' is one process, {ranks} share the model; use 'mp'")
    launched = dist.is_initialized() or dist.is_torchelastic_launched()
    return backend == "mp" or (backend is None and not launched)
