"""A pass: one named, local, counted rewrite of the graph, with a report of what it did and could not do."""

from __future__ import annotations

import difflib
import functools
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node, Proxy

from seamwise.kernels.signature import WrongArguments

from .graph import inserting, is_op, is_weight, place, replace, sweep, value
from .matcher import Excuse, Match, Miss, Pattern


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """What a model is made of, counted on its modules; passes promise their matches from it.

    norms     calls of RMSNorm modules
    residual_norms  those of them that read a residual sum
    rotations tensors rotated by RoPE (queries and keys of each attention)
    gated_mlps      MLPs whose activation is gated
    gate_up_pairs   those of them with separate gate and up projections
    attentions      attentions with separate query, key and value projections
    latent_attentions  attentions whose keys and values come from a latent: two projections read their input
    qk_norms        attentions that norm queries and keys head by head
    layer_norms     LayerNorm modules
    sparse_mlps     MLPs of experts behind a router
    linears         linear layers but the head and routers
    foreign         whether the modules are another library's: what follows from their names is then a guess
    """

    norms: int = 0
    residual_norms: int = 0
    rotations: int = 0
    gated_mlps: int = 0
    gate_up_pairs: int = 0
    attentions: int = 0
    latent_attentions: int = 0
    qk_norms: int = 0
    layer_norms: int = 0
    sparse_mlps: int = 0
    linears: int = 0
    foreign: bool = False


Promise = Callable[[Structure, GraphModule], int]  # how often a pass matches: by the model, and the graph it receives


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """How ranks share a model.

    size, rank, group  of the process group, which is known by its name; "" where this process has not joined it yet
    experts  whole experts on each rank, rather than a part of every expert
    data     each rank has tokens of its own, and all of the model but the experts; every step has as many on each
    redundant  how many places there are for further copies of experts, which the runner moves by their load; None: it
             moves none; with data
    two_batches  a step may be two that take turns while rows travel; with data
    sequence  fewest tokens of the steps in which each rank has a share of the rows between attention and MLPs; 0: none
    overlap  these shares travel while GEMMs run; needs sequence
    plan     pattern of a module's or parameter's path -> style, one of STYLES; None: the model's own
    """

    size: int
    rank: int = 0
    group: str = ""
    experts: bool = False
    data: bool = False
    redundant: int | None = None
    two_batches: bool = False
    sequence: int = 0
    overlap: bool = False
    plan: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank={self.rank} of size={self.size}: wanted 0 to {self.size - 1}")
        if self.data and (not self.experts or self.sequence):
            raise ValueError("ranks with tokens of their own share out experts and nothing else: wanted experts, no SP")
        if self.overlap and not self.sequence:
            raise ValueError("enable_async_tp needs enable_sequence_parallel, whose shares of rows it overlaps")


@dataclass(slots=True, kw_only=True)
class Report:
    """One pass's remark: how often it matched, what was promised, each miss with its reason, its time.

    from_tokens  fewest tokens of the steps whose graph it was applied to
    diff         the first place that changed, as lines of a unified diff; empty unless asked for
    certificate  how it was validated: cases, lossy, max_error; None where it was not
    """

    name: str
    matched: int = 0
    expected: int | None = None
    from_tokens: int = 1
    misses: list[Miss] = field(default_factory=list)
    elapsed_ms: float = 0.0
    certificate: dict[str, Any] | None = None
    diff: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """`rewrite(module, report)` changes the graph in place; `expect(structure, module)` is the promised count.

    `from_tokens(parallel)` is the fewest tokens of the steps that it is for, None where it is not asked for: steps of
    fewer have a graph without it. `parallel`: how ranks share the model, None on one rank.
    A `lossy` pass rounds on purpose (quantization): validation measures its error and does not refuse it.
    """

    name: str
    rewrite: Callable[[GraphModule, Report], None]
    expect: Promise | None = None
    from_tokens: Callable[[Parallel | None], int | None] = lambda parallel: 1
    lossy: bool = False

    def apply(self, module: GraphModule, structure: Structure, *, diff: bool = False) -> Report:
        """Run the pass over the graph and report, with the first change as a diff when asked for."""
        before = _lines(module) if diff else []
        started = time.perf_counter()
        report = Report(name=self.name, expected=self.expect(structure, module) if self.expect else None)
        self.rewrite(module, report)
        if report.expected is not None:
            report.expected -= sum(isinstance(miss.reason, Excuse) for miss in report.misses)
        sweep(module)
        report.elapsed_ms = 1e3 * (time.perf_counter() - started)
        if diff and report.matched:
            hunks = difflib.unified_diff(before, _lines(module), n=1, lineterm="")
            report.diff = [line for i, line in enumerate(itertools.islice(hunks, 2, 60)) if i == 0 or line[:1] in "+- "]
        return report


def _lines(module: GraphModule) -> list[str]:
    """Return the graph's calls, one a line, without module paths."""
    calls = [n for n in module.graph.nodes if n.op == "call_function"]
    return [f"{n.name} = {getattr(n.target, '__name__', n.target)}{n.args}" for n in calls]


def rewrite_each(
    name: str,
    *targets: Any,
    one: Callable[[Node], str | None],
    wanted: Callable[[Node], bool] = lambda node: True,
    expect: Promise | None = None,
    from_tokens: Callable[[Parallel | None], int | None] = lambda parallel: 1,
    lossy: bool = False,
) -> Pass:
    """Make a pass that looks at each call of some ops by itself.

    one     rewrites a call, or returns why not and leaves the graph alone: a miss
    wanted  which calls are candidates at all
    """

    def rewrite(module: GraphModule, report: Report) -> None:
        calls = (node for node in list(module.graph.nodes) if is_op(node, *targets) and wanted(node))
        each_call(calls, one, report)

    return Pass(name=name, rewrite=rewrite, expect=expect, from_tokens=from_tokens, lossy=lossy)


def each_call(nodes: Iterable[Node], one: Callable[[Node], str | None], report: Report) -> None:
    """Rewrite calls one after the other, and report them; `one` as rewrite_each has it."""
    for node in nodes:
        where = place(node), node.name  # read before the node goes
        reason = one(node)
        if reason is None:
            report.matched += 1
        else:
            report.misses.append(Miss(*where, reason))


def pattern_pass(
    name: str,
    *,
    patterns: Callable[[torch.dtype], Sequence[Pattern]],
    key: Callable[[Node], bool],
    expect: Promise | None = None,
) -> Pass:
    """Make a pass from patterns, tried one after the other at every node that looks like their first output.

    patterns  gives the traced patterns for a model of that dtype; asked for once a process
    key       marks a candidate: each node that still answers to it after the pass is a miss and is explained
    """

    patterns = functools.cache(patterns)  # tracing them is a seventh of what compiling a small model takes

    def rewrite(module: GraphModule, report: Report) -> None:
        traced = patterns(model_dtype(module))
        refused: dict[Node, Miss] = {}
        for pattern in traced:
            for node in list(module.graph.nodes):
                if not is_op(node, pattern.outputs[0].target):
                    continue
                match = pattern.match(node)
                if isinstance(match, Miss):
                    continue
                reason = pattern.applies(match) or _unplaceable(match) or _replace(module, match, pattern.replacement)
                if reason is not None:
                    for inner in match.nodes:
                        refused[inner] = Miss(place(node), node.name, reason)
                    continue
                report.matched += 1
            sweep(module)
        for node in module.graph.nodes:
            if key(node):
                report.misses.append(refused.get(node) or _furthest(traced, node))

    return Pass(name=name, rewrite=rewrite, expect=expect)


def model_dtype(module: GraphModule) -> torch.dtype:
    """Return the floating dtype that most weights of the graph have."""
    weights = [value(n).dtype for n in module.graph.find_nodes(op="placeholder") if n.meta.get("weight")]
    return Counter(d for d in weights if d.is_floating_point).most_common(1)[0][0]


def _furthest(patterns: Sequence[Pattern], node: Node) -> Miss:
    """Explain a candidate by the pattern that has most in common with it."""
    return max((p.explain(node) for p in patterns), key=lambda found: found[0])[1]


def _unplaceable(match: Match) -> str | None:
    """Return why the replacement cannot stand before the match's first output, or None."""
    first = min(match.outputs)
    late = [n.name for n in match.inputs if n > first and not is_weight(n)]
    return f"{', '.join(late)} is computed after {first.name}, which the replacement must give" if late else None


def _replace(module: GraphModule, match: Match, replacement: Callable[..., Any]) -> str | None:
    """Put the replacement in the match's place; or return why it would not be the same, and leave the graph alone."""
    first = min(match.outputs)
    try:
        with inserting(module.graph, first, like=match.outputs[0]) as proxy:
            results = replacement(*map(proxy, match.inputs), **match.scalars)
            results = results if isinstance(results, (list, tuple)) else [results]
    except WrongArguments as wrong:  # shapes that broadcast, which no contract's do
        return str(wrong)
    for old, new in zip(match.outputs, results, strict=True):
        assert isinstance(new, Proxy)
        replace(old, new.node)
    return None
