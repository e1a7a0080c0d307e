"""Give each rank its part of the model: columns, rows, vocabulary or experts of the weights that a plan names.

before: q = linear(x, wq); …; y = linear(attention(…), wo); z = rms_norm(y + x, …)
after:  q = linear(x, slice(wq, 0, …)); …; y = wait(all_reduce(linear(attention(…), slice(wo, 1, …)))); z = …
A slice of a weight is a recipe, so loading reads no more than the slice. Each value's placement follows from those of
its inputs, op by op; sums over ranks stand as late as they can, and what cannot be placed is refused, naming the op.
Another way is to build the model with divided sizes. It would need to know what every configuration derives from its
heads, and what it gets wrong (a norm over all heads) would run and be wrong; here it is an error.
Source: Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053; Xu et al. 2021 (GSPMD), https://arxiv.org/abs/2105.04663.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from seamwise.kernels import attention, gather_rows, grouped_linear, kv_append, moe_align, moe_sum

from .graph import aten, infer, is_op, is_weight, value
from .placement import GATED, OWNED, PARTIAL, Cut, Placement, Unplaceable, follow, is_tensor, keeps_partial, sections_of
from .rewrite import Pass, Report

_COLLECTIVES = torch.ops._c10d_functional
GATHERED = ("colwise_gather_output", "colwise_rep")
COLUMNS = ("colwise", "packed_colwise", *GATHERED)
ROWS = ("rowwise", "rowwise_split_input")
EXPERTS, VOCABULARY = "grouped_gemm", "embedding_rowwise"
WHOLE = ("replicate", "replicated_with_grad_allreduce")
STYLES = (*WHOLE, *COLUMNS, *ROWS, EXPERTS, VOCABULARY)  # transformers' names


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """How ranks share a model.

    size, rank, group  of the process group, which is known by its name
    experts  whole experts on each rank, rather than a part of every expert
    plan     pattern of a module's or parameter's path -> style, one of STYLES; None: the model's own
    """

    size: int
    rank: int
    group: str
    experts: bool = False
    plan: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank={self.rank} of size={self.size}: wanted 0 to {self.size - 1}")


def shard(parallel: Parallel, styles: Mapping[str, str]) -> Pass:
    """Return the pass; `styles`: placeholder -> style of each weight that is shared out, biases apart.

    It marks each input of which a rank has a part with meta["local"] = (dimension, start, end).
    """

    def rewrite(module: GraphModule, report: Report) -> None:
        report.matched = len(_Sharder(module, parallel, styles).run())

    return Pass(name="shard", rewrite=rewrite, expect=lambda s: len(styles))


@dataclass(slots=True)
class _Sharder:
    module: GraphModule
    parallel: Parallel
    styles: Mapping[str, str]
    placements: dict[Node, Placement] = field(default_factory=dict)
    shapes: dict[Node, tuple[Any, ...]] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)
    _parts: dict[tuple[Any, ...], Node] = field(default_factory=dict)
    _sums: dict[Node, Node] = field(default_factory=dict)

    def run(self) -> set[str]:
        """Rewrite every op in order; return the placeholders of the weights that were shared out."""
        nodes = list(self.module.graph.nodes)
        self.shapes = {n: tuple(value(n).shape) for n in nodes if is_tensor(n)}
        for node in nodes:
            if node.op == "output":
                node.args = map_arg(node.args, self.whole)
            elif node.op == "call_function" and not is_weight(node):
                self.placements[node] = self.place(node)
        return self.shared

    def place(self, node: Node) -> Placement:
        for source in node.all_input_nodes:
            if source in self._sums:  # once a sum is made, all who come read it: the residual is whole
                node.replace_input_with(source, self._sums[source])
        if not keeps_partial(node, self.placed):
            for source in node.all_input_nodes:
                if self.placed(source) == PARTIAL:
                    node.replace_input_with(source, self.whole(source))
        if (rule := _RULES.get(node.target)) is not None:
            return rule(self, node)
        placed = {n: p for n in node.all_input_nodes if (p := self.placed(n)) is not None}
        if not placed:
            return None
        if OWNED in placed.values():
            if not is_op(node, *GATED):
                raise Unplaceable(node, f"{node.target} is no op on rows of experts")
            result: Placement = OWNED
        elif PARTIAL in placed.values():
            result = PARTIAL
        else:
            result = follow(node, {n: p for n, p in placed.items() if isinstance(p, Cut)}, self.shapes)
        infer(node)
        return result

    def placed(self, node: Any) -> Placement:
        return self.placements.get(node) if isinstance(node, Node) else None

    def whole(self, node: Node) -> Node:
        """Return the sum over the ranks of a summand, once for all who need it; any other node as it is."""
        found = self.placed(node)
        if isinstance(found, Cut) or found == OWNED:
            raise Unplaceable(node, "is the model's result, and a rank has a part of it; plan 'colwise_gather_output'")
        if found is None:
            return node
        if node not in self._sums:
            group = self.parallel.group
            partial = self.add(node, _COLLECTIVES.all_reduce.default, node, "sum", group)
            self._sums[node] = self.add(partial, _COLLECTIVES.wait_tensor.default, partial)
        return self._sums[node]

    def add(self, after: Node, target: Any, *args: Any) -> Node:
        """Insert a call behind a node, with its place in the model."""
        with self.module.graph.inserting_after(after):
            return self._call(after, target, args)

    def before(self, node: Node, target: Any, *args: Any) -> Node:
        """Insert a call before a node, with its place in the model."""
        with self.module.graph.inserting_before(node):
            return self._call(node, target, args)

    def _call(self, like: Node, target: Any, args: tuple[Any, ...]) -> Node:
        new = self.module.graph.call_function(target, args)
        new.meta["nn_module_stack"] = like.meta.get("nn_module_stack")
        infer(new)
        return new

    def part(self, node: Node, weight: Any, cut: Cut, padded: int = 0) -> Node:
        """Return this rank's part of a weight that `node` reads; filled up with zeros to `padded` rows."""
        if not is_weight(weight):
            raise Unplaceable(node, f"{weight} is computed in the step; only weights can be shared out")
        if (weight, cut) not in self._parts:
            # Ahead of every call, where a pass that joins weights finds all of them.
            first = next(n for n in self.module.graph.nodes if n.op == "call_function" and not is_weight(n))
            at, dim = first if weight.op == "placeholder" else node, cut.dim
            size = value(weight).shape[dim]
            bounds = [(min(a, size), min(b, size)) for a, b in cut.bounds(self.parallel.rank, self.parallel.size)]
            found = [self.before(at, aten.slice.Tensor, weight, dim, a, b) for a, b in bounds]
            new = self.before(at, aten.cat.default, found, dim) if len(found) > 1 else found[0]
            missing = padded - value(new).shape[dim] if padded else 0
            if missing:
                sides = [0, 0] * (-dim - 1)
                new = self.before(at, aten.constant_pad_nd.default, new, [*sides, 0, missing])
            self._parts[weight, cut] = new
        return self._parts[weight, cut]

    def style(self, weight: Any) -> str | None:
        found = self.styles.get(weight.name) if isinstance(weight, Node) else None
        if found is not None:
            self.shared.add(weight.name)
        return found

    def even(self, node: Node, dim: int, n: int) -> Cut:
        if n % self.parallel.size:
            raise Unplaceable(node, f"{n} do not divide among {self.parallel.size} ranks")
        return Cut(dim, ((n, self.parallel.size),))

    def own_bias(self, node: Node, bias: Any) -> Any:
        """Return a bias that is added once: zero on all ranks but the first."""
        return bias and self.before(node, aten.mul.Tensor, bias, 0.0 if self.parallel.rank else 1.0)

    def rows_of(self, node: Node, x: Node, weight: Node) -> tuple[Node, Node]:
        """Return x and the weight's columns that fit it, where a rank has a part of the sum over them."""
        cut = self.placed(x)
        if cut is None:
            cut = self.even(node, -1, self.shapes[x][-1])
            (start, end), *_ = cut.bounds(self.parallel.rank, self.parallel.size)
            x = self.before(node, aten.slice.Tensor, x, -1, start, end)
        if not isinstance(cut, Cut) or cut.dim != -1 or any(parts != self.parallel.size for _, parts in cut.sections):
            raise Unplaceable(node, f"its input is placed {cut}; wanted columns, a part on each rank")
        return x, self.part(node, weight, cut)

    def gathered(self, node: Node, width: int) -> Node:
        """Return the ranks' columns of a result side by side, `width` of them."""
        sizes = [n if isinstance(n, int) else -1 for n in self.shapes[node]]
        share, ranks = value(node).shape[-1], self.parallel.size
        rows = self.add(node, aten.reshape.default, node, [-1, share])
        parts = self.add(rows, _COLLECTIVES.all_gather_into_tensor.default, rows, ranks, self.parallel.group)
        parts = self.add(parts, _COLLECTIVES.wait_tensor.default, parts)
        parts = self.add(parts, aten.reshape.default, parts, [ranks, -1, share])
        parts = self.add(parts, aten.permute.default, parts, [1, 0, 2])
        parts = self.add(parts, aten.reshape.default, parts, [*sizes[:-1], ranks * share])
        return self.add(parts, aten.slice.Tensor, parts, -1, 0, width) if ranks * share > width else parts


def _linear(s: _Sharder, node: Node) -> Placement:
    x, weight, *rest = node.args
    assert isinstance(x, Node) and isinstance(weight, Node)
    bias, style, cut = rest[0] if rest else None, s.style(weight), s.placed(x)
    if style is None:
        if isinstance(cut, Cut) and cut.dim == -1:
            raise Unplaceable(node, "a rank has a part of its input's columns, and the plan has no style for its weight")
        if cut is not None:
            infer(node)
        return cut
    if style in ROWS:
        node.args = (*s.rows_of(node, x, weight), *([s.own_bias(node, bias)] if bias else []))
        infer(node)
        return PARTIAL
    if cut is not None:
        raise Unplaceable(node, f"its input is placed {cut}; style {style!r} wants it whole")
    width = s.shapes[node][-1]
    if style not in (*GATHERED, VOCABULARY):  # the table of a vocabulary that is the head too
        sections = sections_of(node, s.parallel.size)
        columns = [s.part(node, w, Cut(d, sections)) for w, d in ((weight, -2), (bias, -1)) if w is not None]
        node.args = (x, *columns)
        infer(node)
        return Cut(-1, sections)
    share = -(-width // s.parallel.size)
    padded = ((share * s.parallel.size, s.parallel.size),)
    node.args = (x, *(s.part(node, w, Cut(d, padded), share) for w, d in ((weight, -2), (bias, -1)) if w is not None))
    infer(node)
    users = list(node.users)
    result = s.gathered(node, width)
    for user in users:
        user.replace_input_with(node, result)
    return None


def _grouped_linear(s: _Sharder, node: Node) -> Placement:
    x, weight, order, starts, top_k, *rest = node.args
    assert isinstance(x, Node) and isinstance(weight, Node)
    bias, style = rest[0] if rest else None, s.style(weight)
    if style == EXPERTS:
        cut = s.even(node, -3, s.shapes[weight][0])
        biases = [s.part(node, bias, Cut(-2, cut.sections))] if bias else []
        node.args = (x, s.part(node, weight, cut), order, starts, top_k, *biases)
        result: Placement = OWNED
    elif style in ROWS:
        node.args = (*s.rows_of(node, x, weight), order, starts, top_k, *([s.own_bias(node, bias)] if bias else []))
        result = PARTIAL
    elif style in COLUMNS and style not in GATHERED:
        sections = sections_of(node, s.parallel.size)
        biases = [s.part(node, bias, Cut(-1, sections))] if bias else []
        node.args = (x, s.part(node, weight, Cut(-2, sections)), order, starts, top_k, *biases)
        result = Cut(-1, sections)
    elif s.placed(x) is None and style is None:
        return None
    else:
        raise Unplaceable(node, f"style {style!r} for experts whose input is placed {s.placed(x)}")
    infer(node)
    return result


def _moe_align(s: _Sharder, node: Node) -> Placement:
    """Number the experts from the rank's first: those of other ranks are then no experts."""
    readers = [user for item in node.users for user in item.users if is_op(user, grouped_linear.op)]
    if any(isinstance(r.args[1], Node) and s.styles.get(r.args[1].name) == EXPERTS for r in readers):
        chosen, experts = node.args[:2]
        cut = s.even(node, -1, experts)  # type: ignore[arg-type]
        start = cut.width * s.parallel.rank
        node.args = (s.before(node, aten.sub.Tensor, chosen, start), cut.width, *node.args[2:])
        infer(node)
    return None


def _moe_sum(s: _Sharder, node: Node) -> Placement:
    y, _, *shared = node.args
    if s.placed(y) not in (PARTIAL, OWNED):
        return None
    if any(other is not None and s.placed(other) != PARTIAL for other in shared):
        raise Unplaceable(node, "what shared experts give is whole on every rank, and would be added by each")
    infer(node)
    return PARTIAL


def _gather_rows(s: _Sharder, node: Node) -> Placement:
    """Look tokens up in a part of the vocabulary: those of other ranks give zero."""
    table, ids = node.args
    assert isinstance(table, Node) and isinstance(ids, Node)
    if s.placed(table) is not None:
        raise Unplaceable(node, f"takes rows of what is placed {s.placed(table)}; wanted the whole of it")
    if s.style(table) != VOCABULARY:
        return None
    size, rank = s.parallel.size, s.parallel.rank
    share = -(-s.shapes[table][0] // size)
    part = s.part(node, table, Cut(-2, ((share * size, size),)), share)
    local = s.before(node, aten.sub.Tensor, ids, rank * share)
    inside = s.before(node, aten.clamp.default, local, 0, share - 1)
    outside = s.before(node, aten.unsqueeze.default, s.before(node, aten.ne.Tensor, local, inside), -1)
    node.args = (part, inside)
    infer(node)
    users = list(node.users)
    masked = s.add(node, aten.masked_fill.Scalar, node, outside, 0.0)
    for user in users:
        user.replace_input_with(node, masked)
    s.placements[masked], s.shapes[masked] = PARTIAL, s.shapes[node]
    return None


def _kv_append(s: _Sharder, node: Node) -> Placement:
    """Let a rank cache the heads that it has."""
    k, v, *caches = node.args[:4]
    if (cut := s.placed(k)) != s.placed(v):
        raise Unplaceable(node, f"keys are placed {cut}, values {s.placed(v)}; wanted alike")
    if cut is None:
        return None
    if not isinstance(cut, Cut) or cut.dim != -2 or len(cut.sections) != 1:
        raise Unplaceable(node, f"keys and values are placed {cut}; wanted heads, a part on each rank")
    ((start, end),) = cut.bounds(s.parallel.rank, s.parallel.size)
    for cache in caches:
        assert isinstance(cache, Node) and cache.op == "placeholder"
        cache.meta["local"] = (1, start, end)
        cache.meta["val"] = value(cache)[:, start:end].clone()
        s.placements[cache] = Cut(-3, cut.sections)
    if any(scale is not None and s.shapes[scale] != (1,) for scale in node.args[5:]):  # type: ignore[index]
        raise Unplaceable(node, "scales are of each head; wanted one of all")
    return None


def _attention(s: _Sharder, node: Node) -> Placement:
    cut, cache = s.placed(node.args[0]), s.placed(node.args[1])
    if cut is None and cache is None:
        return None
    if not (isinstance(cut, Cut) and cut.dim == -2 and len(cut.sections) == 1 and isinstance(cache, Cut)):
        raise Unplaceable(node, f"queries are placed {cut}, the cache {cache}; wanted heads of both")
    ((heads, parts),) = cut.sections
    if parts != s.parallel.size:
        raise Unplaceable(node, f"{heads} heads do not divide among {s.parallel.size} ranks; use fewer")
    by_head = {i for i in (9, 10) if i < len(node.args) and node.args[i] is not None}  # sinks, slopes
    node.args = tuple(
        s.part(node, a, Cut(-1, cut.sections)) if i in by_head else a for i, a in enumerate(node.args)
    )
    infer(node)
    return cut


_RULES: dict[Any, Callable[[_Sharder, Node], Placement]] = {
    aten.linear.default: _linear,
    grouped_linear.op: _grouped_linear,
    moe_align.op: _moe_align,
    moe_sum.op: _moe_sum,
    gather_rows.op: _gather_rows,
    kv_append.op: _kv_append,
    attention.op: _attention,
}
