"""How large the KV cache is: one of three options of LLM says so, or none; a model that guesses has a share of it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from seamwise.runtime.distributed.group import smallest
from seamwise.runtime.speculation.model_drafter import ModelDrafter


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheMemory:
    """Options of LLM, of which at most one is given. Raises ValueError for two, and for values that are none."""

    gpu_memory_utilization: float | None = None
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None

    def __post_init__(self) -> None:
        utilization = self.gpu_memory_utilization
        if utilization is not None and not (type(utilization) in (int, float) and 0 < utilization <= 1):
            raise ValueError(f"gpu_memory_utilization={utilization!r}: wanted above 0 and at most 1")
        for name, least in (("kv_cache_memory_bytes", 1), ("num_gpu_blocks_override", 2)):
            if (value := getattr(self, name)) is not None and (type(value) is not int or value < least):
                raise ValueError(f"{name}={value!r}: wanted a whole number of at least {least}; None is the default")
        if len(said := [name for name in self.__slots__ if getattr(self, name) is not None]) > 1:
            raise ValueError(f"{' and '.join(said)} each say how large the KV cache is; leave all but one out")

    def allocate(self, runner: Any, drafter: ModelDrafter | None, *, ranks_are_processes: bool, **planned: Any) -> None:
        """Allocate a runner's KV cache, and the drafter's, in what one was to have; requests are as long as fits.

        planned  further limits of ModelRunner.plan
        """
        on_cpu = torch.device(runner.options.device).type == "cpu"
        if self.gpu_memory_utilization is not None and on_cpu:
            what = f"gpu_memory_utilization={self.gpu_memory_utilization} has no effect on a CPU"
            warnings.warn(f"{what}; use kv_cache_memory_bytes", stacklevel=3)
        ours, kv_bytes = runner.kv_spec.bytes_per_block, self.kv_cache_memory_bytes
        if self.num_gpu_blocks_override is not None:
            kv_bytes = self.num_gpu_blocks_override * ours
        utilization = (not on_cpu and self.gpu_memory_utilization) or 0.9
        plan = runner.plan(kv_cache_memory_bytes=kv_bytes, utilization=utilization, **planned)
        theirs = 0 if drafter is None else drafter.bytes_per_block
        if theirs and self.num_gpu_blocks_override is None:
            plan = runner.plan(kv_cache_memory_bytes=plan.kv_bytes * ours // (ours + theirs), **planned)
        blocks, length = plan.num_blocks, plan.max_model_len
        if runner.options.tensor_parallel_size > 1 and not ranks_are_processes:
            blocks, length = (smallest(value, runner.options.device) for value in (blocks, length))
        if length < runner.options.max_model_len:
            runner.limit_model_len(length)
        runner.allocate_kv(blocks)
        if drafter is not None:
            drafter.allocate(blocks)
