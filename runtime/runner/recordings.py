"""A runner's recorded steps: what may be recorded and at what cost (the plan), and the recordings, made when needed.

full       a step that decodes one token of each request, seams and all, for each number of requests
piecewise  any other step: its tokens padded to the next of some sizes, recorded between seams, which run eagerly on the
           step's own ragged metadata

Modes are named as vLLM's: https://docs.vllm.ai/en/latest/design/cuda_graphs.html
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from seamwise.compile.program import Program
from seamwise.compile.record.recorder import Recording
from seamwise.compile.record.recorders import recorder_for
from seamwise.runtime.build.runner_config import RunnerConfig
from seamwise.runtime.build.step import STEP_ARGUMENTS, StepInput

from .static_inputs import StaticInputs

_LOG = logging.getLogger(__name__)
_OF_SEAMS = ("block_table", "seq_lens", "query_starts")  # only seams read them, so they need no padding
Key = tuple[str, int]  # "full" or "piecewise", tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturePlan:
    """What may be recorded, and the bytes it takes: of values that are alive at once, and of buffers for inputs.

    keys   piecewise sizes, and the largest full step: smaller ones take less
    calls  of a replay, by mode: recordings, and seams between them
    All recordings share memory: together they take what the largest does.
    """

    keys: tuple[Key, ...]
    calls: dict[str, int]
    token_bytes: int
    logit_bytes: int
    max_rows: int
    input_bytes: int
    budget_bytes: int

    @classmethod
    def of(cls, program: Program, options: RunnerConfig) -> CapturePlan:
        """Return the plan of a compiled model."""
        rows = options.max_recorded_requests
        sizes = {"full": (rows,), "piecewise": options.capture_sizes}
        keys = tuple((mode, n) for mode in options.recorded_modes for n in sizes[mode])
        tokens = max((n for _, n in keys), default=0)
        return cls(
            keys=keys, calls={"full": 1, "piecewise": len(program.calls) + program.num_seam_calls},
            token_bytes=program.token_bytes, logit_bytes=program.logit_bytes, max_rows=rows,
            input_bytes=8 * 4 * tokens + 4 * rows * (options.max_blocks + 2) if keys else 0,
            budget_bytes=options.max_recorded_bytes,
        )  # fmt: skip

    def num_bytes(self, key: Key) -> int:
        """Return what a recording takes, with the buffers for inputs."""
        return self.input_bytes + self.token_bytes * key[1] + self.logit_bytes * min(key[1], self.max_rows)

    @property
    def total_bytes(self) -> int:
        """Bytes to set aside: when all that fits the budget is recorded."""
        return max((n for n in map(self.num_bytes, self.keys) if n <= self.budget_bytes), default=0)

    def __str__(self) -> str:
        lines = [f"recordings, within {self.budget_bytes / 1e6:.0f} MB:"]
        for mode, tokens in self.keys:
            needs = self.num_bytes((mode, tokens))
            beyond = "" if needs <= self.budget_bytes else ", too much: runs eagerly"
            lines.append(f"    {mode:9} {tokens:5} tokens, {self.calls[mode]:4} calls, {needs / 1e6:8.1f} MB{beyond}")
        return "\n".join(lines)


@dataclass(slots=True, kw_only=True)
class RecordingStats:
    """How steps ran: "full", "piecewise", "eager" (no recording serves them), "over_budget" (eager for want of memory);
    the keys recorded, in order; and the bytes that their recorder holds."""

    steps: Counter[str] = field(default_factory=Counter)
    recorded: list[Key] = field(default_factory=list)
    num_bytes: int = 0


class Recordings:
    """The recordings of one runner. All share the recorder's memory: results are valid until the next step."""

    def __init__(self, program: Program, options: RunnerConfig, agree: Callable[[int], int] = int) -> None:
        """`agree` returns the smallest of all ranks' numbers: they record the same steps, or wait for ever."""
        self.plan, self.stats = CapturePlan.of(program, options), RecordingStats()
        self.recorder = recorder_for(torch.device(options.device))
        self._options, self._agree = options, agree
        self._made: dict[Key, Recording | None] = {}
        self._static: StaticInputs | None = None
        if self.plan.keys:
            _LOG.info("%s", self.plan)
            self._static = StaticInputs(
                max_tokens=max(n for _, n in self.plan.keys), max_requests=options.max_recorded_requests,
                max_blocks=options.max_blocks, device=options.device,
            )  # fmt: skip

    def __getitem__(self, key: Key) -> Recording:
        recording = self._made[key]
        if recording is None:
            raise KeyError(key)
        return recording

    def clear(self) -> None:
        """Forget every recording: what they refer to has moved."""
        self._made.clear()

    def run(
        self, function: Callable[..., Tensor], batch: StepInput, flat: Callable[[StepInput], list[Tensor]]
    ) -> Tensor | None:
        """Run a step by its recording, made now if there is none; return None where it must run eagerly."""
        key = self._key(batch)
        if key is not None and key not in self._made and not self._may_record(key):
            self._made[key] = None
        if key is None or self._static is None or self._made.get(key, self) is None:
            self.stats.steps["eager" if key is None else "over_budget"] += 1
            return None
        mode, tokens = key
        self.stats.steps[mode] += 1
        if mode == "full":
            arguments, varying = flat(self._static.fill(batch)), []
        else:
            rows = min(tokens, self._options.max_recorded_requests)
            arguments = flat(self._static.fill(batch, tokens, rows))
            varying = [len(arguments) - 1 - STEP_ARGUMENTS[::-1].index(name) for name in _OF_SEAMS]
        recording = self._made.get(key)
        if recording is not None:
            return recording.replay(*arguments)[: batch.logit_rows.shape[0]]
        recording = self.recorder.record(function, *arguments, full=mode == "full", varying=varying)
        self._made[key] = recording
        self.stats.recorded.append(key)
        self.stats.num_bytes = recording.num_bytes
        return recording.results[: batch.logit_rows.shape[0]]

    def _may_record(self, key: Key) -> bool:
        needed = max(self.plan.num_bytes(key), self.plan.input_bytes + self.stats.num_bytes)
        return bool(self._agree(int(needed <= self.plan.budget_bytes)))

    def _key(self, batch: StepInput) -> Key | None:
        tokens, rows = batch.token_ids.shape[0], batch.logit_rows.shape[0]
        requests, blocks = batch.block_table.shape
        modes, most = self._options.recorded_modes, self._options.max_recorded_requests
        if "full" in modes and tokens == requests == rows <= most and blocks <= self._options.max_blocks:
            return "full", tokens
        sizes = self._options.capture_sizes
        if "piecewise" in modes and 0 < tokens <= sizes[-1]:
            size = sizes[bisect_left(sizes, tokens)]
            if rows <= min(size, most):
                return "piecewise", size
        return None
