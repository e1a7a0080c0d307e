"""The compiler as one function: every stage and every pass, in order."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from seamwise import passes
from seamwise.passes import Pass, Report, Structure

from .capture import Captured
from .codegen import Source
from .derive import hoist
from .ledger import Ledger
from .lower import choose_providers
from .program import Program
from .split import Piece, Seam, split
from .verify import verify

# An order constraint is a comment on its line.
RAISE = (
    passes.RAISE_RMS_NORM,
    passes.RAISE_ROPE,
    passes.RAISE_SWIGLU,
    passes.RAISE_GATHER,
)
FUSE = (
    passes.FUSE_ADD_RMS_NORM,  # after raise_rms_norm: it reads the named op
    passes.FUSE_GATE_UP,  # after raise_swiglu, whose cat it removes; before fuse_qkv, which joins all other siblings
    passes.FUSE_QKV,
)
LOWER = (
    passes.PACK_LINEAR,  # after every pass that joins weights: it packs what they made
)


class BrokenPromise(RuntimeError):
    """A pass matched fewer places than the model's structure promises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineConfig:
    """What may differ from the default pipeline.

    disabled      names of passes not to run
    allow_missed  names of passes that may match fewer places than promised
    providers     contract name -> the provider that must serve it
    """

    disabled: tuple[str, ...] = ()
    allow_missed: tuple[str, ...] = ()
    providers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {p.name for p in (*RAISE, *FUSE, *LOWER)}
        for name in (*self.disabled, *self.allow_missed):
            if name not in known:
                raise ValueError(f"pipeline: no pass is named {name!r}; there are: {', '.join(sorted(known))}")


def compile_graph(captured: Captured, structure: Structure, config: PipelineConfig, ledger: Ledger) -> Program:
    """Turn a captured graph into a program. The graph is rewritten in place."""
    module, reports = captured.module, []
    with ledger.stage("raise"):
        passes.canonicalize(module)
        verify(module, "capture")
        reports += _run(RAISE, captured, structure, config)
    with ledger.stage("fuse"):
        reports += _run(FUSE, captured, structure, config)
    with ledger.stage("lower"):
        reports += _run(LOWER, captured, structure, config)
        recipes = hoist(captured)  # before split: a derived weight belongs to no piece
        chosen = choose_providers(module, config.providers)
        verify(module, "lower", lowered=True)
    with ledger.stage("split"):
        steps = split(module)
        for item in steps:
            if isinstance(item, Piece):
                verify(item.module, "split", lowered=True, piece=True)
    with ledger.stage("generate"):
        program = _generate(captured, steps, recipes)
    program.reports, program.providers = reports, dict(sorted(chosen.items()))
    return program


def _run(group: tuple[Pass, ...], captured: Captured, structure: Structure, config: PipelineConfig) -> list[Report]:
    reports = []
    for entry in group:
        if entry.name in config.disabled:
            continue
        report = entry.apply(captured.module, structure)
        verify(captured.module, entry.name)
        if report.expected is not None and report.matched < report.expected and entry.name not in config.allow_missed:
            shown = "\n  ".join(map(str, report.misses[:8])) or "no candidate was found"
            raise BrokenPromise(
                f"{entry.name} matched {report.matched} of {report.expected} places the model's structure promises."
                f" Misses:\n  {shown}\nMend the model or the pattern, or pass allow_missed=[{entry.name!r}]."
            )
        reports.append(report)
    return reports


def _generate(captured: Captured, steps: list[Piece | Seam], recipes: dict[str, dict]) -> Program:
    source, names, calls, texts = Source(), {}, [], {}
    for item in steps:
        if not isinstance(item, Piece):
            continue
        if item.digest not in names:
            names[item.digest] = f"piece_{item.digest}"
            source.add_piece(names[item.digest], item)
            texts[names[item.digest]] = item.module.print_readable(print_output=False)
        calls.append(names[item.digest])
    output = next(iter(captured.graph.find_nodes(op="output")))
    outputs = [n.name for n in output.args[0]]
    source.add_step(steps, captured.inputs, list(recipes), outputs)
    return Program(
        source=source.text(),
        calls=calls,
        num_seams=sum(isinstance(a, Seam) and not isinstance(b, Seam) for a, b in pairwise([*steps, None])),
        num_seam_calls=sum(isinstance(item, Seam) for item in steps),
        recipes=recipes,
        inputs=captured.inputs,
    )
