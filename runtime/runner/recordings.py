"""A runner's recorded steps: what may be recorded and at what cost (the plan), and the recordings, made when needed.

Full       a step that computes as many tokens of each request, all their logits wanted: decode (one token) and the
           verification of drafts; seams and all
Piecewise  any other step: its tokens padded to the next of some sizes, recorded between seams, which run eagerly on the
           step's own ragged metadata
Eager      what no recording serves, op by op

Modes are named as vLLM's: https://docs.vllm.ai/en/latest/design/cuda_graphs.html
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seamwise.compile.program import Program
from seamwise.compile.record.recorder import Recording
from seamwise.compile.record.recorders import recorder_for
from seamwise.runtime.build.runner_config import RunnerConfig
from seamwise.runtime.build.step import STEP_ARGUMENTS, StepInput

from .static_inputs import OF_SEAMS, StaticInputs, num_bytes, sizes_of

_LOG = logging.getLogger(__name__)


class Full(NamedTuple):
    """The recording of a step of `requests` requests, `tokens_each` of each; `adapters`: some of them have one."""

    requests: int
    tokens_each: int = 1
    adapters: bool = False

    @property
    def tokens(self) -> int:
        return self.requests * self.tokens_each


class Piecewise(NamedTuple):
    """The recording of steps that are padded to `tokens` tokens; `adapters`: some of which have one."""

    tokens: int
    adapters: bool = False


class Eager(NamedTuple):
    """No recording; why: "eager": none serves such a step, "over_budget": there is no memory for it."""

    why: str = "eager"


class Empty(NamedTuple):
    """A step of no tokens."""


Key = Full | Piecewise
Kind = Key | Eager | Empty


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturePlan:
    """What may be recorded, and the bytes it takes: of values that are alive at once, and of buffers for inputs.

    keys   piecewise sizes, and the largest full steps: smaller ones take less
    calls  of a replay, by mode: recordings, and seams between them
    All recordings share memory: together they take what the largest does.
    """

    keys: tuple[Key, ...]
    calls: dict[str, int]
    token_bytes: int
    logit_bytes: int
    max_rows: int
    sizes: dict[str, int]
    budget_bytes: int
    adapters: bool = False

    @classmethod
    def of(cls, program: Program, options: RunnerConfig) -> CapturePlan:
        """Return the plan of a compiled model."""
        rows, most_each = options.max_recorded_requests, 1 + options.num_speculative_tokens
        possible: dict[str, list[Key]] = {
            "full": [Full(rows, n) for n in sorted({1, most_each})],
            "piecewise": [Piecewise(n) for n in options.capture_sizes],
        }
        keys = tuple(key for mode in options.recorded_modes for key in possible[mode])
        return cls(
            keys=keys, calls={"full": 1, "piecewise": len(program.calls) + program.num_seam_calls},
            token_bytes=program.token_bytes, logit_bytes=program.logit_bytes, max_rows=rows,
            sizes=sizes_of(
                max((key.tokens for key in keys), default=0), rows, options.max_blocks, len(program.kv_groups)
            ),
            budget_bytes=options.max_recorded_bytes,
            adapters=options.pipeline.max_loras > 0,
        )  # fmt: skip

    @property
    def input_bytes(self) -> int:
        """Bytes of the buffers for inputs, which all recordings share."""
        return num_bytes(self.sizes, self.adapters) if self.keys else 0

    def num_bytes(self, key: Key) -> int:
        """Return what a recording takes, with the buffers for inputs."""
        rows = key.tokens if isinstance(key, Full) else min(key.tokens, self.max_rows)
        return self.input_bytes + self.token_bytes * key.tokens + self.logit_bytes * rows

    @property
    def total_bytes(self) -> int:
        """Bytes to set aside: when all that fits the budget is recorded."""
        return max((n for n in map(self.num_bytes, self.keys) if n <= self.budget_bytes), default=0)

    def __str__(self) -> str:
        lines = [f"recordings, within {self.budget_bytes / 1e6:.0f} MB:"]
        for key in self.keys:
            needs, mode = self.num_bytes(key), type(key).__name__.lower()
            beyond = "" if needs <= self.budget_bytes else ", too much: runs eagerly"
            lines.append(
                f"    {mode:9} {key.tokens:5} tokens, {self.calls[mode]:4} calls, {needs / 1e6:8.1f} MB{beyond}"
            )
        return "\n".join(lines)


@dataclass(slots=True, kw_only=True)
class RecordingStats:
    """How steps ran: "full", "piecewise", "eager" (no recording serves them), "over_budget" (eager for want of memory),
    "empty"; the keys recorded, in order; the bytes that their recorder holds; and what cascade attention spares."""

    steps: Counter[str] = field(default_factory=Counter)
    recorded: list[Key] = field(default_factory=list)
    num_bytes: int = 0
    spared: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))

    @property
    def cascade_tiles(self) -> int:
        """Tiles of 64 keys, of all layers, that were attended to with other requests' queries and not read again."""
        return int(self.spared)


class Recordings:
    """The recordings of one runner. All share the recorder's memory: results are valid until the next step."""

    def __init__(self, program: Program, options: RunnerConfig, agree: Callable[[int], int] = int) -> None:
        """`agree` returns the smallest of all ranks' numbers: they record the same steps, or wait for ever."""
        self.plan, self.stats = CapturePlan.of(program, options), RecordingStats()
        self.recorder = recorder_for(torch.device(options.device))
        self._options, self._agree = options, agree
        self._made: dict[Key, Recording | None] = {}
        self._filled: dict[Full, tuple[StepInput, list[Any]]] = {}  # a full step's buffers, and all its arguments
        self._static: StaticInputs | None = None
        if self.plan.keys:
            _LOG.info("%s", self.plan)
            self._static = StaticInputs(self.plan.sizes, options.device, self.plan.adapters)

    def __getitem__(self, key: Key) -> Recording:
        recording = self._made[key]
        if recording is None:
            raise KeyError(key)
        return recording

    def clear(self) -> None:
        """Forget every recording: what they refer to has moved."""
        self._made.clear()
        self._filled.clear()

    def kind_of(self, batch: StepInput) -> Kind:
        """Return how a step is run: by which recording, made already or not, or by none and why; and count it."""
        kind = self._kind(batch)
        match kind:
            case Empty():
                counted = "empty"
            case Eager(why):
                counted = why
            case Full() | Piecewise() as key:
                if key not in self._made and not self._may_record(key):
                    self._made[key] = None
                if self._made.get(key, self) is None:
                    kind = Eager(counted := "over_budget")
                else:
                    counted = "full" if isinstance(key, Full) else "piecewise"
        self.stats.steps[counted] += 1
        return kind

    def run(
        self, key: Key, function: Callable[..., Any], batch: StepInput, flat: Callable[[StepInput], list[Any]]
    ) -> Any:
        """Run a step by its recording, made now if there is none; return what the function returns, of its own rows."""
        assert self._static is not None
        varying: list[int] = []
        match key:
            case Full():
                if key not in self._filled:
                    views = self._static.views(key.tokens, key.requests, key.adapters)
                    self._filled[key] = views, flat(views)
                views, arguments = self._filled[key]
                self._static.fill(views, batch)
            case Piecewise(tokens, _):
                rows = min(tokens, self._options.max_recorded_requests)
                arguments = flat(self._static.fill_padded(batch, tokens, rows))
                further = 2 * (batch.num_groups - 1)  # each group's slots and block table, behind all others
                plain = len(arguments) - further
                varying = [plain - 1 - STEP_ARGUMENTS[::-1].index(name) for name in OF_SEAMS]
                varying += range(plain + 1, plain + further, 2)
        recording = self._made.get(key)
        if recording is not None:
            results = recording.replay(*arguments)
        else:
            recording = self.recorder.record(function, *arguments, full=isinstance(key, Full), varying=varying)
            self._made[key] = recording
            self.stats.recorded.append(key)
            self.stats.num_bytes = recording.num_bytes
            results = recording.results
        if isinstance(key, Full):
            return results
        wanted = batch.logit_rows.shape[0]
        return results[:wanted] if isinstance(results, Tensor) else tuple(each[:wanted] for each in results)

    def _may_record(self, key: Key) -> bool:
        needed = max(self.plan.num_bytes(key), self.plan.input_bytes + self.stats.num_bytes)
        return bool(self._agree(int(needed <= self.plan.budget_bytes)))

    def _kind(self, batch: StepInput) -> Kind:
        tokens, rows = batch.token_ids.shape[0], batch.logit_rows.shape[0]
        if not tokens:
            return Empty()
        requests, blocks = batch.block_table.shape[-2:]
        adapters = batch.token_adapters is not None and len(batch.token_adapters) > 0
        modes, most = self._options.recorded_modes, self._options.max_recorded_requests
        if "full" in modes and rows == tokens and requests <= most and blocks <= self._options.max_blocks:
            each = tokens // requests
            if each <= 1 + self._options.num_speculative_tokens and _uniform(batch, each):
                return Full(requests, each, adapters)
        sizes = self._options.capture_sizes
        if "piecewise" in modes and tokens <= sizes[-1]:
            size = sizes[bisect_left(sizes, tokens)]
            if rows <= min(size, most):
                return Piecewise(size, adapters)
        return Eager()


def _uniform(batch: StepInput, each: int) -> bool:
    """Return whether every request has `each` tokens."""
    starts = batch.query_starts.numpy()
    return bool((starts[1:] - starts[:-1] == each).all())
