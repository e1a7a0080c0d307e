"""The compiler as one function: every stage and every pass, in order."""

from __future__ import annotations

import atexit
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from pathlib import Path

from seamwise import passes
from seamwise.compile.check.awaited import check_awaited
from seamwise.compile.check.validate import Validator
from seamwise.compile.check.verify import verify
from seamwise.compile.explain.piece_costs import piece_costs
from seamwise.compile.explain.traffic import communicates
from seamwise.passes import Pass, Report, Structure

from .capture import Captured
from .derive import hoist
from .inductor import compile_piece, loose_ops
from .lower import choose_providers
from .make_program import LoweredStep, generate
from .plugins import discovered, placed_into
from .program import Program
from .shard_plan import styles_of
from .split import Piece, Seam, split
from .stages import carried_of, cut_stage
from .startup_times import Ledger

# An order constraint is a comment on its line.
RAISE = (
    passes.RAISE_RMS_NORM,
    passes.RAISE_LAYER_NORM,
    passes.RAISE_ROPE,
    passes.RAISE_SWIGLU,
    passes.RAISE_MOE,
    passes.RAISE_GATHER,
)
FUSE = (
    passes.FUSE_ADD_RMS_NORM,  # after raise_rms_norm: it reads the named op
    passes.FUSE_ALLREDUCE_RMS_NORM,  # after fuse_add_rms_norm, whose sum it reads
    passes.FUSE_GATE_UP,  # after raise_swiglu, whose cat it removes; before fuse_qkv, which joins all other siblings
    passes.FUSE_QKV,
    passes.ADD_ADAPTERS,  # where the step has adapters; after the joins, so that joined layers are changed together
    passes.CANCEL_VIEWS,
    passes.SEQUENCE_PARALLEL,  # where it is asked for; after cancel_views, which joins the chain of residuals
    passes.ASYNC_TP,  # where it is asked for; after sequence_parallel, and the joins, which make one layer of several
    passes.CSE,  # before the fusions that ask whether two branches read the same tables
    passes.FUSE_QK_NORM_ROPE,  # after fuse_qkv, whose joint projection it reads
    passes.FUSE_ROPE_KV_WRITE,  # after fuse_qk_norm_rope, which takes the keys' rope where there are norms
)
FUSE_QUANT = (
    passes.QUANTIZE_LINEAR,  # after the joins, which see plain linears; before the fusions of the quantize it inserts
    passes.QUANTIZE_EXPERTS,
    passes.QUANTIZE_DISPATCH,  # after quantize_experts, whose quantize it moves; before routing takes it over
    passes.FUSE_MOE_ROUTE_QUANT,  # before the fusions with norms, which would say that the router reads the rows too
    passes.FUSE_MOE_SILU_MUL_QUANT,  # before fuse_silu_mul_quant, which takes what is left
    passes.FUSE_RMS_NORM_QUANT,
    passes.FUSE_ADD_RMS_NORM_QUANT,
    passes.FUSE_ALLREDUCE_RMS_NORM_QUANT,
    passes.FUSE_SILU_MUL_QUANT,
    passes.FUSE_ATTENTION_QUANT,
    passes.BEGIN_EXCHANGES,  # last: what it puts between the halves is then as few kernels as it will be
)
LOWER = (
    passes.PACK_LINEAR,  # after every pass that joins weights: it packs what they made
)


# Inductor takes 5 to 25 s a piece and saves about 3 us for each loose op that a step runs (CPU, one token): from
# 64 of them on it is worth 0.2 ms a step.
MIN_LOOSE_CALLS = 64


_LOG = logging.getLogger(__name__)


class BrokenPromise(RuntimeError):
    """A pass matched fewer places than the structure of a model of ours promises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineConfig:
    """What may differ from the default pipeline.

    disabled      names of passes not to run
    inductor      which pieces Inductor compiles: "auto", those whose loose ops it pays for; "always", all with any;
                  "never": loose ops run one by one
    allow_missed  names of passes that may match fewer places than promised
    quantization  how the weights of linear layers are quantized at load: None or one of passes.SCHEMES
    providers     contract name -> the provider that must serve it
    parallel      how ranks share the model; None: one rank has it all
    stage         which of how many stages, one process behind the other, this is: (0, 1) is all of the model
    max_loras, max_lora_rank  adapters that a step may mix, and their greatest rank; 0: no adapters
    diffs         keep the first place that each pass changed, as a diff
    validate      check after every pass, in float64 on drawn inputs, that the graph computes what it did
    """

    disabled: tuple[str, ...] = ()
    inductor: str = "auto"
    allow_missed: tuple[str, ...] = ()
    providers: dict[str, str] = field(default_factory=dict)
    validate: bool = False
    diffs: bool = False
    quantization: str | None = None
    parallel: passes.Parallel | None = None
    stage: tuple[int, int] = (0, 1)
    max_loras: int = 0
    max_lora_rank: int = 16

    def __post_init__(self) -> None:
        known = {p.name for group in ordered_passes() for p in group}
        for name in (*self.disabled, *self.allow_missed):
            if name not in known:
                raise ValueError(f"pipeline: no pass is named {name!r}; there are: {', '.join(sorted(known))}")
        if self.quantization is not None and self.quantization not in passes.SCHEMES:
            raise ValueError(f"quantization={self.quantization!r}; wanted None or one of {', '.join(passes.SCHEMES)}")
        if self.inductor not in ("auto", "always", "never"):
            raise ValueError(f"pipeline: inductor={self.inductor!r}; wanted 'auto', 'always' or 'never'")


def ordered_passes(quantization: str | None = None) -> list[list[Pass]]:
    """Return the groups raise, quantize, fuse and lower, with the passes that installed packages place among ours."""
    weights = (passes.quantize_weights(passes.SCHEMES[quantization]),) if quantization else ()
    return placed_into((RAISE, weights, (*FUSE, *FUSE_QUANT), LOWER), discovered())


def range_starts(config: PipelineConfig) -> list[int]:
    """Return where the ranges of numbers of tokens begin that have graphs of their own: 1, and passes' thresholds."""
    running = [p for group in ordered_passes() for p in group if p.name not in config.disabled]
    return sorted({1, *(n for p in running if (n := p.from_tokens(config.parallel)) is not None)})


def rewrite(
    captured: Captured, structure: Structure, config: PipelineConfig, ledger: Ledger,
    validator: Validator | None = None, from_tokens: int = 1,
) -> list[Report]:  # fmt: skip
    """Run every pass for steps of so many tokens over a captured graph, in place, and return their reports."""
    reports: list[Report] = []
    with ledger.stage("raise"):
        passes.canonicalize(captured.module)
        verify(captured.module, "capture")
    groups = ordered_passes(config.quantization)
    for stage, group in zip(("raise", "quantize", "fuse", "lower"), groups, strict=True):
        with ledger.stage(stage):
            reports += _run(group, captured, structure, config, validator, from_tokens)
        if stage == "raise" and config.parallel is not None:  # before weights are quantized: each rank its own part
            with ledger.stage("shard"):
                entry = passes.shard(config.parallel, styles_of(captured, config.parallel))
                reports += _run([entry], captured, structure, config, validator, from_tokens)
                if config.parallel.redundant is not None:
                    entry = passes.balance_experts(config.parallel, captured.weights)
                    reports += _run([entry], captured, structure, config, validator, from_tokens)
    return reports


def compile_graph(
    captured: Captured, structure: Structure, config: PipelineConfig, ledger: Ledger, validator: Validator | None = None
) -> Program:
    """Turn a captured graph into a program. The graph is rewritten in place; a validator checks every pass.

    Raises ValueError when the configuration asks for validation and no validator is given.
    """
    assert config.parallel is None or config.parallel.group, "this process has not joined the ranks that share a model"
    if config.validate and validator is None:
        raise ValueError("compile_graph: validate=True needs a validator, with step inputs to run the graph on")
    starts, made = range_starts(config), list[LoweredStep]()
    graphs = [captured, *(captured.copy() for _ in starts[1:])]
    validators = [validator, *(validator and replace(validator, captured=graph) for graph in graphs[1:])]
    for first, graph, check in zip(starts, graphs, validators, strict=True):
        reports = rewrite(graph, structure, config, ledger, check, first)
        with ledger.stage("lower"):
            recipes = hoist(graph)  # before split: a derived weight belongs to no piece
            chosen = choose_providers(graph.module, config.providers)
            verify(graph.module, "lower", lowered=True)
            check_awaited(graph.module)
            taken: list[str] = []
            if config.stage[1] > 1:
                graph, taken = cut_stage(graph, recipes, *config.stage)
                verify(graph.module, "cut_stage", lowered=True)
        with ledger.stage("split"):
            steps = split(graph.module)
            for item in steps:
                if isinstance(item, Piece):
                    verify(item.module, "split", lowered=True, piece=True)
        made.append(
            LoweredStep(first=first, graph=graph, steps=steps, recipes=recipes, reports=reports, providers=chosen)
        )
    with ledger.stage("generate"):
        program = generate(made, in_turns=config.parallel is not None and config.parallel.two_batches)
    if config.stage[1] > 1:
        program.carried = carried_of(graph.module, taken)
    with ledger.stage("compile"):
        _compile(program, [item for step in made for item in step.steps], config)
    return program


def _run(
    group: Sequence[Pass], captured: Captured, structure: Structure, config: PipelineConfig,
    validator: Validator | None, from_tokens: int,
) -> list[Report]:  # fmt: skip
    reports = []
    for entry in group:
        least = entry.from_tokens(config.parallel)
        if entry.name in config.disabled or least is None or least > from_tokens:
            continue
        report = entry.apply(captured.module, structure, diff=config.diffs)
        report.from_tokens = from_tokens
        verify(captured.module, entry.name)
        if report.expected is not None and report.matched < report.expected and entry.name not in config.allow_missed:
            shown = "\n  ".join(map(str, report.misses[:8])) or "no candidate was found"
            missed = (
                f"{entry.name} matched {report.matched} of {report.expected} places that the model and its graph"
                f" promise. Misses:\n  {shown}\n"
            )
            if not structure.foreign:
                allowed = [*config.allow_missed, entry.name]
                raise BrokenPromise(f"{missed}Mend the model or the pattern, or pass allow_missed={allowed}.")
            _LOG.warning(
                "%sThe model's class is transformers': its own ops run there, which is right and slower.", missed
            )
        if validator is not None:
            if entry.name == "shard":
                validator.share()
            validator.check(report, lossy=entry.lossy)
        reports.append(report)
    return reports


def _compile(program: Program, steps: list[Piece | Seam], config: PipelineConfig) -> None:
    """Give each distinct piece with enough loose ops to Inductor, once."""
    repeats: Counter[str] = reduce(or_, (Counter(each.calls) for each in program.ranges))  # most in one step
    distinct = {f"piece_{item.digest}": item for item in steps if isinstance(item, Piece)}
    for name, item in distinct.items():
        loose = len(loose_ops(item.module))
        program.loose_ops[name] = loose
        program.piece_costs[name] = piece_costs(item.module)
        wanted = {"auto": loose * repeats[name] >= MIN_LOOSE_CALLS, "always": loose > 0, "never": False}
        if wanted[config.inductor] and communicates(item.module):
            if config.inductor == "always":
                raise ValueError(f"inductor='always': {name} has collectives, which no package holds; use 'auto'")
        elif wanted[config.inductor]:
            folder = Path(tempfile.mkdtemp(prefix="seamwise-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)  # packages are read from it until then
            program.packages[name] = compile_piece(item.module, folder / f"{name}.pt2")
