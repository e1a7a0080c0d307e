"""What sharding does to one graph: it walks over the ops, keeps placements, inserts sums and parts of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from seamwise.passes.graph import aten, infer, is_op, is_weight, value
from seamwise.passes.rewrite import Parallel

from .stored_parts import held_by, part_of
from .tensor_placement import (
    GATED,
    OWNED,
    PARTIAL,
    ROUTED,
    Cut,
    Placement,
    Unplaceable,
    follow,
    is_tensor,
    keeps_partial,
)

_COLLECTIVES = torch.ops._c10d_functional
GATHERED = ("colwise_gather_output", "colwise_rep")
COLUMNS = ("colwise", "packed_colwise", *GATHERED)
ROWS = ("rowwise", "rowwise_split_input")
EXPERTS, VOCABULARY = "grouped_gemm", "embedding_rowwise"
WHOLE = ("replicate", "replicated_with_grad_allreduce")
STYLES = (*WHOLE, *COLUMNS, *ROWS, EXPERTS, VOCABULARY)  # transformers' names


@dataclass(slots=True)
class Sharder:
    """The walk over one graph: every op in order, its placement by the rule of its target, or as its inputs' imply.

    placements  of the nodes so far; shapes: of the whole tensors; shared: placeholders of the weights shared out
    sent        alignment of experts -> the dispatch of the rows that they are for
    """

    module: GraphModule
    parallel: Parallel
    styles: Mapping[str, str]
    rules: Mapping[Any, Callable[[Sharder, Node], Placement]]
    placements: dict[Node, Placement] = field(default_factory=dict)
    shapes: dict[Node, tuple[Any, ...]] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)
    sent: dict[Node, Node] = field(default_factory=dict)
    _parts: dict[tuple[Any, ...], Node] = field(default_factory=dict)
    _sums: dict[Node, Node] = field(default_factory=dict)
    _last_part: Node = field(init=False)

    def run(self) -> set[str]:
        """Rewrite every op in order; return the placeholders of the weights that were shared out."""
        nodes = list(self.module.graph.nodes)
        self.shapes = {n: tuple(value(n).shape) for n in nodes if is_tensor(n)}
        self._last_part = next(n for n in nodes if n.op == "call_function" and not is_weight(n)).prev
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
        if (rule := self.rules.get(node.target)) is not None:
            return rule(self, node)
        placed = {n: p for n in node.all_input_nodes if (p := self.placed(n)) is not None}
        if not placed:
            return None
        if OWNED in placed.values():
            if not is_op(node, *GATED):
                raise Unplaceable(node, f"{node.target} is no op on rows of experts")
            result: Placement = OWNED
        elif ROUTED in placed.values():
            if not is_op(node, *GATED, aten.slice.Tensor) and torch.Tag.pointwise not in node.target.tags:  # type: ignore[union-attr]
                raise Unplaceable(node, f"{node.target} is no op on rows that were sent to experts")
            result = ROUTED
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
        if isinstance(found, Cut) or found in (OWNED, ROUTED):
            raise Unplaceable(node, "is the model's result, and a rank has a part of it; plan 'colwise_gather_output'")
        if found is None:
            return node
        if node not in self._sums:
            group = self.parallel.group
            begun = self.add(node, _COLLECTIVES.all_reduce.default, node, "sum", group)
            self._sums[node] = self.add(begun, _COLLECTIVES.wait_tensor.default, begun)
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

    def _ahead(self, target: Any, *args: Any) -> Node:
        self._last_part = self.add(self._last_part, target, *args)
        return self._last_part

    def part(
        self, node: Node, weight: Any, cut: Cut, padded: int = 0, bounds: Sequence[tuple[int, int]] | None = None
    ) -> Node:
        """Return this rank's part of a weight that `node` reads; filled up with zeros to `padded` rows.

        It is marked with meta["part"] = (dimension, ranges, shape of the whole), for what goes with the weight.
        bounds  of the part, where it is another than the cut's
        """
        if not is_weight(weight):
            raise Unplaceable(node, f"{weight} is computed in the step; only weights can be shared out")
        if (weight, cut) not in self._parts:
            size = value(weight).shape[cut.dim]
            # Ahead of every call, where a pass that joins weights finds all of them.
            add = self._ahead if held_by(weight).op == "placeholder" else partial(self.before, node)
            if bounds is None:
                bounds = [(min(a, size), min(b, size)) for a, b in cut.bounds(self.parallel.rank, self.parallel.size)]
            made = self._parts[weight, cut] = part_of(node, weight, cut.dim, bounds, padded or cut.width, add)
            made.meta["part"] = cut.dim, bounds, tuple(value(weight).shape)
        return self._parts[weight, cut]

    def style(self, weight: Any) -> str | None:
        held = held_by(weight)
        found = self.styles.get(held.name) if isinstance(held, Node) else None
        if found is not None:
            self.shared.add(held.name)
        return found

    def even(self, node: Node, dim: int, n: int) -> Cut:
        if n % self.parallel.size:
            raise Unplaceable(node, f"{n} do not divide among {self.parallel.size} ranks")
        return Cut(dim, ((n, self.parallel.size),))

    def own_experts(self, node: Node, experts: int) -> tuple[list[tuple[int, int]], int]:
        """Return the ranges of experts that this rank begins with, and how many places all ranks have for experts."""
        places = experts + (self.parallel.redundant or 0)
        ((start, end),) = self.even(node, -1, places).bounds(self.parallel.rank, self.parallel.size)
        ranges = [(start, min(end, experts)), (max(start, experts) - experts, end - experts)]
        return [(a, b) for a, b in ranges if a < b], places

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
