"""A runner's recorded steps: what may be recorded and at what cost (the plan), and the recordings, made when needed.

Full       a step that computes as many tokens of each request, all their logits wanted: decode (one token) and the
           verification of drafts; seams and all
Piecewise  any other step: its tokens padded to the next of some sizes, recorded between seams, which run eagerly on the
           step's own ragged metadata
InTurns    a step that is taken as two batches in turns (enable_dbo), both on one recording in the order of their turns
Eager      what no recording serves, op by op

Modes are named as vLLM's: https://docs.vllm.ai/en/latest/design/cuda_graphs.html
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
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


class InTurns(NamedTuple):
    """The recording of two batches that take turns, by what each would be alone: both full, or both piecewise."""

    first: Full | Piecewise
    second: Full | Piecewise


class Eager(NamedTuple):
    """No recording; why: "eager": none serves such a step, "over_budget": there is no memory for it, "empty": there is
    nothing to compute."""

    why: str = "eager"


Single = Full | Piecewise
Key = Single | InTurns
Kind = Key | Eager


def batches_of(key: Key) -> tuple[Single, ...]:
    """Return what a recording is of each of its batches."""
    return tuple(key) if isinstance(key, InTurns) else (key,)


def mode_of(key: Key) -> str:
    """Return "full" or "piecewise"."""
    return "full" if isinstance(batches_of(key)[0], Full) else "piecewise"


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturePlan:
    """What may be recorded, and the bytes it takes: of values that are alive at once, and of buffers for inputs.

    keys   piecewise sizes, and the largest full steps: smaller ones take less; and two batches of the largest in turns
    calls  of a replay of one batch, by mode: recordings, and seams between them
    paired  modes in which two batches that take turns are recorded as one, each with buffers of its own. Piecewise on a
            CPU alone: at a seam a CUDA graph ends, and nothing may be under way that it has begun
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
    paired: tuple[str, ...] = ()

    @classmethod
    def of(cls, program: Program, options: RunnerConfig) -> CapturePlan:
        """Return the plan of a compiled model."""
        rows, most_each = options.max_recorded_requests, 1 + options.num_speculative_tokens
        possible: dict[str, list[Single]] = {
            "full": [Full(rows, n) for n in sorted({1, most_each})],
            "piecewise": [Piecewise(n) for n in options.capture_sizes],
        }
        singles = [key for mode in options.recorded_modes for key in possible[mode]]
        held = options.recorded_modes if torch.device(options.device).type == "cpu" else ("full",)
        paired = tuple(mode for mode in held if options.enable_dbo and mode in options.recorded_modes)
        pairs = [InTurns(possible[mode][-1], possible[mode][-1]) for mode in paired]
        return cls(
            keys=(*singles, *pairs), calls={"full": 1, "piecewise": len(program.calls) + program.num_seam_calls},
            token_bytes=program.token_bytes, logit_bytes=program.logit_bytes, max_rows=rows,
            sizes=sizes_of(
                max((key.tokens for key in singles), default=0), rows, options.max_blocks, len(program.kv_groups)
            ),
            budget_bytes=options.max_recorded_bytes, adapters=options.pipeline.max_loras > 0, paired=paired,
        )  # fmt: skip

    @property
    def input_bytes(self) -> int:
        """Bytes of the buffers for inputs, which all recordings share."""
        return (1 + bool(self.paired)) * num_bytes(self.sizes, self.adapters) if self.keys else 0

    def num_bytes(self, key: Key) -> int:
        """Return what a recording takes, with the buffers for inputs."""
        needed = self.input_bytes
        for one in batches_of(key):
            rows = one.tokens if isinstance(one, Full) else min(one.tokens, self.max_rows)
            needed += self.token_bytes * one.tokens + self.logit_bytes * rows
        return needed

    @property
    def total_bytes(self) -> int:
        """Bytes to set aside: when all that fits the budget is recorded."""
        return max((n for n in map(self.num_bytes, self.keys) if n <= self.budget_bytes), default=0)

    def __str__(self) -> str:
        lines = [f"recordings, within {self.budget_bytes / 1e6:.0f} MB:"]
        for key in self.keys:
            needs, mode, batches = self.num_bytes(key), mode_of(key), batches_of(key)
            beyond = "" if needs <= self.budget_bytes else ", too much: runs eagerly"
            lines.append(
                f"    {mode:9} {' + '.join(f'{one.tokens:5}' for one in batches)} tokens,"
                f" {self.calls[mode]:4} calls{' each, in turns' * (len(batches) > 1)}, {needs / 1e6:8.1f} MB{beyond}"
            )
        return "\n".join(lines)


@dataclass(slots=True, kw_only=True)
class RecordingStats:
    """How steps ran: "full", "piecewise", "eager" (no recording serves them), "over_budget" (eager for want of memory),
    "empty"; "in_turns": how many of these were taken as two batches; the keys recorded, in order; the bytes that their
    recorder holds; and what cascade attention spares."""

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
        self._filled: dict[tuple[int, Full], tuple[StepInput, list[Any]]] = {}  # a full batch's buffers, and arguments
        self._static: list[StaticInputs] = []  # of each batch of a step
        if self.plan.keys:
            _LOG.info("%s", self.plan)
            for _ in range(1 + bool(self.plan.paired)):
                self._static.append(StaticInputs(self.plan.sizes, options.device, self.plan.adapters))

    def __getitem__(self, key: Key) -> Recording:
        recording = self._made[key]
        if recording is None:
            raise KeyError(key)
        return recording

    def clear(self) -> None:
        """Forget every recording: what they refer to has moved."""
        self._made.clear()
        self._filled.clear()

    def kind_of(self, *batches: StepInput) -> Kind:
        """Return how a step, or two batches in turns, is run: by which recording, made already or not, or by none and
        why; and count it."""
        kind = self._kind(batches)
        if not isinstance(kind, Eager):
            if kind not in self._made and not self._may_record(kind):
                self._made[kind] = None
            if self._made.get(kind, self) is None:
                kind = Eager("over_budget")
        counted = kind.why if isinstance(kind, Eager) else mode_of(kind)
        self.stats.steps.update([counted] if len(batches) == 1 else [counted, "in_turns"])
        return kind

    def run(
        self, key: Key, function: Callable[..., Any], batches: Sequence[StepInput],
        flat: Callable[[StepInput], list[Any]],
    ) -> Any:  # fmt: skip
        """Run a step by its recording, made now if there is none; return what the function returns.

        Behind the rows of a batch may be rows of padding.
        """
        arguments, varying = list[Any](), list[int]()
        for i, (one, batch) in enumerate(zip(batches_of(key), batches, strict=True)):
            given, seams = self._arguments(i, one, batch, flat)
            varying += [len(arguments) + at for at in seams]
            arguments += given
        recording = self._made.get(key)
        if recording is not None:
            return recording.replay(*arguments)
        full = mode_of(key) == "full"
        self._made[key] = recording = self.recorder.record(function, *arguments, full=full, varying=varying)
        self.stats.recorded.append(key)
        self.stats.num_bytes = recording.num_bytes
        return recording.results

    def _arguments(
        self, i: int, one: Single, batch: StepInput, flat: Callable[[StepInput], list[Any]]
    ) -> tuple[list[Any], list[int]]:
        """Return the inputs of the step's batch i, in its buffers, and which of them only seams read and vary."""
        match one:
            case Full():
                if (i, one) not in self._filled:
                    views = self._static[i].views(one.tokens, one.requests, one.adapters)
                    self._filled[i, one] = views, flat(views)
                views, arguments = self._filled[i, one]
                self._static[i].fill(views, batch)
                return arguments, []
            case Piecewise(tokens, _):
                rows = min(tokens, self._options.max_recorded_requests)
                arguments = flat(self._static[i].fill_padded(batch, tokens, rows))
                further = 2 * (batch.num_groups - 1)  # each group's slots and block table, behind all others
                plain = len(arguments) - further
                varying = [plain - 1 - STEP_ARGUMENTS[::-1].index(name) for name in OF_SEAMS]
                return arguments, [*varying, *range(plain + 1, plain + further, 2)]

    def _may_record(self, key: Key) -> bool:
        needed = max(self.plan.num_bytes(key), self.plan.input_bytes + self.stats.num_bytes)
        return bool(self._agree(int(needed <= self.plan.budget_bytes)))

    def _kind(self, batches: Sequence[StepInput]) -> Kind:
        if not batches[0].num_tokens:
            return Eager("empty")
        for mode in self._options.recorded_modes if len(batches) == 1 else self.plan.paired:
            find = self._full if mode == "full" else self._piecewise
            found = [key for batch in batches if (key := find(batch)) is not None]
            if len(found) == len(batches):
                return found[0] if len(found) == 1 else InTurns(*found)
        return Eager()

    def _full(self, batch: StepInput) -> Full | None:
        tokens, (requests, blocks), options = batch.num_tokens, batch.block_table.shape[-2:], self._options
        known = batch.logit_rows.shape[0] == tokens and requests <= options.max_recorded_requests
        each = tokens // requests if known and blocks <= options.max_blocks else 0
        known = 0 < each <= 1 + options.num_speculative_tokens and _uniform(batch, each)
        return Full(requests, each, _has_adapters(batch)) if known else None

    def _piecewise(self, batch: StepInput) -> Piecewise | None:
        tokens, sizes = batch.token_ids.shape[0], self._options.capture_sizes
        if tokens > sizes[-1]:
            return None
        size = sizes[bisect_left(sizes, tokens)]
        fits = batch.logit_rows.shape[0] <= min(size, self._options.max_recorded_requests)
        return Piecewise(size, _has_adapters(batch)) if fits else None


def _has_adapters(batch: StepInput) -> bool:
    return batch.token_adapters is not None and len(batch.token_adapters) > 0


def _uniform(batch: StepInput, each: int) -> bool:
    """Return whether every request has `each` tokens."""
    starts = batch.query_starts.numpy()
    return bool((starts[1:] - starts[:-1] == each).all())
