"""What trainers do to a model between rollouts, by vLLM's names: sleep, wake, new weights, calls on every worker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from seamwise.runtime.runner.profile import ProfilerConfig
from seamwise.runtime.speculation.model_drafter import ModelDrafter

from .executor import Executor, WorkerModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelExecutorPath:
    """The first step of TRL's way to a model: llm.llm_engine.model_executor.driver_worker.model_runner.model."""

    model_executor: Any

    @property
    def model_config(self) -> WorkerModelConfig:
        """What TRL asks of the model: llm.llm_engine.model_config.max_model_len."""
        config: WorkerModelConfig = self.model_executor.driver_worker.model_config
        return config


class ModelControl:
    """Methods of whatever has an engine and an executor (`LLM`).

    drafter  a second model that guesses, in this process: it sleeps and wakes with the first
    """

    executor: Executor
    engine: Any
    drafter: ModelDrafter | None = None
    enable_sleep_mode: bool | None = None
    profiler_config: ProfilerConfig | None = None
    data_parallel_rank: int | None = None

    @property
    def llm_engine(self) -> ModelExecutorPath:
        """The way to the worker of this process: `.model_executor.driver_worker`."""
        return ModelExecutorPath(model_executor=self.executor)

    @property
    def weight_version(self) -> str:
        """Which weights the next token is computed with; see ModelRunner.weight_version."""
        version: str = self.executor.collective_rpc("weight_state")[0][0]
        return version

    def collective_rpc(
        self, method: str | Callable[..., Any], timeout: float | None = None, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:  # fmt: skip
        """Call a method of every worker (worker_extension_cls adds methods), or a function that takes the worker.

        Returns the results by rank. What changes weights must go with reset_prefix_cache. Raises ValueError for a
        method that workers do not have.
        """
        return self.executor.collective_rpc(method, timeout, args, kwargs)

    def sleep(self, level: int = 1) -> None:
        """Give memory back to the system: the KV cache, and weights, which come back (1) or are given anew (2).

        Raises RuntimeError while requests run; ValueError for another level, or with enable_sleep_mode=False.
        """
        if self.enable_sleep_mode is False:
            raise ValueError("sleep: enable_sleep_mode=False was asked for; leave it out to let the model sleep")
        if self.drafter is not None and self.drafter.stays_awake:
            raise ValueError("sleep: the module that guesses stays in memory; leave speculative_config out")
        self.engine.reset_prefix_cache()
        self.executor.collective_rpc("sleep", None, (level,))
        if self.drafter is not None:
            self.drafter.sleep()

    def wake_up(self, tags: Iterable[str] | None = None) -> None:
        """Take memory again: "weights", "kv_cache", by default both. After sleep(2) weights must be given first."""
        asked = None if tags is None else list(tags)
        self.executor.collective_rpc("wake", None, (asked,))
        if self.drafter is not None:
            self.drafter.wake(asked)

    def is_sleeping(self) -> bool:
        """Return whether weights or KV cache have no memory."""
        return bool(self.executor.collective_rpc("weight_state")[0][1])

    def start_weight_update(self) -> None:
        """Begin an update in several calls: no step runs until it is finished. RuntimeError while requests run."""
        self.engine.reset_prefix_cache()
        self.executor.collective_rpc("start_weight_update")

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Write new values of parameters, by the checkpoint's names, in place; nothing is compiled again.

        weights  (name, tensor) pairs, or a dict; numpy's arrays are taken too

        The prefix cache is forgotten. Raises ValueError for weights that do not fit, all named, nothing being changed;
        RuntimeError while requests run. What is joined with others (q with k and v) waits for them.
        """
        self.engine.reset_prefix_cache()
        self.executor.collective_rpc("load_weights", None, (weights,))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End an update; the weights are then of this version. Raises RuntimeError that lists what was not given."""
        self.executor.collective_rpc("finish_weight_update", None, (weight_version,))

    def weights_digest(self) -> str:
        """Return a digest of rank 0's weights; ModelRunner.weights_digest(weights) is a trainer's."""
        digest: str = self.executor.collective_rpc("weights_digest")[0]
        return digest

    def start_profile(self, profile_prefix: str | None = None) -> None:
        """Let every rank record what it does, until stop_profile(); profile_prefix is what files' names begin with.

        Raises ValueError without profiler_config or for a prefix that is a path, RuntimeError while one is taken.
        """
        if self.profiler_config is None:
            raise ValueError(
                "profiles are taken with LLM(profiler_config={'profiler': 'torch', 'torch_profiler_dir': …}) or"
                " --profiler-config"
            )
        if profile_prefix and Path(profile_prefix).name != profile_prefix:
            raise ValueError(f"profile_prefix={profile_prefix!r}: wanted the beginning of a file's name, no folder")
        engine = "" if self.data_parallel_rank is None else f"dp{self.data_parallel_rank}"
        prefix = "_".join(filter(None, (profile_prefix, engine)))
        self.executor.collective_rpc("start_profile", None, (self.profiler_config, prefix))

    def stop_profile(self) -> None:
        """Write what was recorded to torch_profiler_dir. Raises RuntimeError where nothing is."""
        self.executor.collective_rpc("stop_profile")
