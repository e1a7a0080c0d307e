"""Profiles by torch.profiler, with the names that vLLM gives the options.

A trace has every thread of the process: the one that computes steps ("seamwise step") and the one that plans them
("seamwise plan") and makes outputs of them ("seamwise answer"), so it shows what of the host's work steps hide.
Source: https://docs.vllm.ai/en/latest/contributing/profiling/.
"""

from __future__ import annotations

import atexit
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_NOTHING = nullcontext()
_running: list[torch.profiler.profile] = []  # torch has one profiler a process


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfilerConfig:
    """What start_profile() records.

    profiler            "torch"
    torch_profiler_dir  folder for traces, one file for each rank and profile, which chrome://tracing and
                        https://ui.perfetto.dev read
    torch_profiler_with_stack, …_with_flops, …_record_shapes, …_with_memory  what of each op is recorded beside its time
    torch_profiler_use_gzip  files are compressed
    """

    profiler: str = "torch"
    torch_profiler_dir: str = ""
    torch_profiler_with_stack: bool = True
    torch_profiler_with_flops: bool = False
    torch_profiler_record_shapes: bool = False
    torch_profiler_with_memory: bool = False
    torch_profiler_use_gzip: bool = True

    def __post_init__(self) -> None:
        if self.profiler != "torch":
            raise ValueError(f"profiler_config: profiler={self.profiler!r}, wanted 'torch'")
        if not self.torch_profiler_dir:
            raise ValueError("profiler_config needs torch_profiler_dir, the folder that traces are written to")
        object.__setattr__(self, "torch_profiler_dir", str(Path(self.torch_profiler_dir).absolute()))


def start_profile(config: ProfilerConfig, name: str) -> None:
    """Record what this process does from now on, for DIR/name.….pt.trace.json.

    Raises RuntimeError while it does so already, OSError for a folder that cannot be made.
    """
    if _running:
        raise RuntimeError("start_profile: a profile is being taken in this process; stop_profile() ends it")
    Path(config.torch_profiler_dir).mkdir(parents=True, exist_ok=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    write = torch.profiler.tensorboard_trace_handler(config.torch_profiler_dir, name, config.torch_profiler_use_gzip)
    profile = torch.profiler.profile(
        activities=activities, with_stack=config.torch_profiler_with_stack, with_flops=config.torch_profiler_with_flops,
        record_shapes=config.torch_profiler_record_shapes, profile_memory=config.torch_profiler_with_memory,
        experimental_config=torch._C._profiler._ExperimentalConfig(profile_all_threads=True), on_trace_ready=write,
    )  # fmt: skip
    profile.start()
    _running.append(profile)


def stop_profile() -> None:
    """End the profile and write it. Raises RuntimeError where none is being taken."""
    if not _running:
        raise RuntimeError("stop_profile: no profile is being taken; start_profile() begins one")
    _running.pop().stop()


@atexit.register
def _end_with_process() -> None:
    """Write a profile that nobody has ended: a process that ends while one is taken crashes in torch."""
    if _running:
        stop_profile()


def span(name: str) -> AbstractContextManager[Any]:
    """Return what names a stretch of a thread's time in a trace; it costs nothing where none is taken."""
    return torch.profiler.record_function(f"seamwise {name}") if _running else _NOTHING
