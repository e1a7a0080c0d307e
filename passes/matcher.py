"""Match a small traced pattern against a graph, and say where and why it stopped when it does not match.

A pattern is a plain torch function, traced once at the sizes and dtype it is given. In the traced pattern
- every placeholder matches any tensor node,
- a float equal to a named scalar's example is a hole: whatever number the graph has there is read,
- an int of at least `HOLE` is a hole too (sizes are drawn that large), equal holes meaning equal values,
- every other argument must be equal, and add and mul match in either order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from .canonicalize import canonicalize
from .graph import VIEWS, aten, place, value

HOLE = 1000
_COMMUTATIVE = (aten.add.Tensor, aten.mul.Tensor)


class Excuse(str):
    """A reason that lies in the checkpoint, not in the model's code or in a pass: no promise is broken by it."""


@dataclass(frozen=True, slots=True)
class Miss:
    """Why a pattern did not match at one place: the first difference found, which may be an Excuse."""

    module: str
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.module or '(top level)'}: at {self.node}: {self.reason}"


@dataclass(slots=True)
class Match:
    """The nodes bound by one match: inputs in the pattern's order, outputs, and the scalars read from the graph."""

    inputs: list[Node]
    outputs: list[Node]
    scalars: dict[str, Any]
    sizes: dict[int, Any]
    nodes: set[Node]


@dataclass(slots=True, kw_only=True)
class Pattern:
    """A traced pattern and what replaces it.

    scalars      example values that mark holes for named numbers
    replacement  replacement(*inputs, **scalars) on proxies, giving what replaces the pattern's outputs, in order
    applies      returns why a match must not be rewritten (a shape, a dtype), or None
    """

    graph: Graph
    inputs: list[Node]
    outputs: list[Node]
    scalars: Mapping[str, float]
    replacement: Callable[..., Any]
    applies: Callable[[Match], str | None]

    @classmethod
    def trace(
        cls,
        function: Callable[..., Any],
        replacement: Callable[..., Any],
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype | Sequence[torch.dtype],
        *,
        applies: Callable[[Match], str | None] = lambda match: None,
        **scalars: float,
    ) -> Pattern:
        """Trace `function(*tensors, **scalars)` on fake tensors of the given shapes, of one dtype or one each."""
        dtypes = [dtype] * len(shapes) if isinstance(dtype, torch.dtype) else dtype
        with torch._subclasses.FakeTensorMode():
            examples = [torch.empty(s, dtype=d) for s, d in zip(shapes, dtypes, strict=True)]
            module = make_fx(lambda *tensors: function(*tensors, **scalars), pre_dispatch=True)(*examples)
        for node in module.graph.nodes:
            if node.op == "get_attr":
                raise ValueError(f"pattern {function.__name__}: uses a constant tensor; pass it as an argument")
        canonicalize(module)
        nodes = list(module.graph.nodes)
        outputs = nodes[-1].args[0]
        return cls(
            graph=module.graph,
            inputs=[n for n in nodes if n.op == "placeholder"],
            outputs=list(outputs) if isinstance(outputs, (list, tuple)) else [outputs],
            scalars=scalars,
            replacement=replacement,
            applies=applies,
        )

    def match(self, anchor: Node) -> Match | Miss:
        """Match with the pattern's first output at `anchor`; a Miss tells the first difference met deepest."""
        return _Attempt(self).run(anchor)

    def explain(self, key: Node) -> tuple[int, Miss]:
        """Say why no match covers `key`: of all anchors downstream, the attempt that bound most nodes, and how many."""
        wanted, best = self.outputs[0].target, None
        frontier, seen = [key], {key}
        for _ in range(len(self.graph.nodes)):
            for node in frontier:
                if node.op == "call_function" and node.target == wanted:
                    attempt = _Attempt(self)
                    result = attempt.run(node)
                    if isinstance(result, Miss) and (best is None or attempt.furthest > best[0]):
                        best = (attempt.furthest, result)
            frontier = [u for u in dict.fromkeys(u for n in frontier for u in n.users) if u not in seen]
            seen.update(frontier)
        if best is None:
            reason = f"no {_name(wanted)} follows {_name(key.target)}, which the pattern ends with"
            return -1, Miss(place(key), key.name, reason)
        return best


@dataclass(slots=True)
class _Attempt:
    """One try at matching: what is bound so far, and the difference met after binding most nodes."""

    pattern: Pattern
    bound: dict[Node, Node] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)
    sizes: dict[int, Any] = field(default_factory=dict)
    furthest: int = -1
    miss: Miss | None = None

    def run(self, anchor: Node) -> Match | Miss:
        if not self.node(self.pattern.outputs[0], anchor):
            assert self.miss is not None
            return self.miss
        outputs = [self.bound.get(p) for p in self.pattern.outputs]
        assert all(outputs), "a pattern's other outputs must be interior nodes of its first"
        inner = {n for p, n in self.bound.items() if p.op != "placeholder"}
        for p, n in self.bound.items():
            if p.op == "placeholder" or p in self.pattern.outputs or n.target in VIEWS:
                continue  # a view may stay for its other users: it costs nothing
            for user in n.users:
                if user not in inner:
                    self.furthest = len(self.bound)
                    return Miss(
                        place(n), n.name, f"has an extra user {user.name} outside the pattern, so it must be kept"
                    )
        inputs = [self.bound[p] for p in self.pattern.inputs]
        return Match(inputs, [n for n in outputs if n], dict(self.scalars), dict(self.sizes), inner)

    def fail(self, node: Any, reason: str) -> bool:
        if len(self.bound) > self.furthest:
            self.furthest = len(self.bound)
            is_node = isinstance(node, Node)
            self.miss = Miss(place(node) if is_node else "", node.name if is_node else repr(node), reason)
        return False

    def node(self, p: Node, n: Any, user: Node | None = None) -> bool:
        if p in self.bound:
            return self.bound[p] is n or self.fail(
                user or n, f"reads {n} where the pattern needs {self.bound[p].name} again"
            )
        if not isinstance(n, Node):
            return self.fail(user, f"argument is {n!r}, the pattern has a tensor there")
        if p.op == "placeholder":
            if not isinstance(value(n), torch.Tensor):
                return self.fail(n, "is not a tensor")
            self.bound[p] = n
            return True
        if n.op != "call_function" or n.target != p.target:
            return self.fail(n, f"is {_name(n.target)}, the pattern has {_name(p.target)}")
        if value(n).dtype != value(p).dtype:
            return self.fail(n, f"has dtype {value(n).dtype}, the pattern has {value(p).dtype}")
        orders = [list(n.args)]
        if n.target in _COMMUTATIVE and len(n.args) == 2:
            orders.append([n.args[1], n.args[0]])
        state = (dict(self.bound), dict(self.scalars), dict(self.sizes))
        for args in orders:
            self.bound[p] = n
            if self.argument(list(p.args), args, n) and self.argument(dict(p.kwargs), dict(n.kwargs), n):
                return True
            self.bound, self.scalars, self.sizes = dict(state[0]), dict(state[1]), dict(state[2])
        return False

    def argument(self, p: Any, n: Any, user: Node) -> bool:
        if isinstance(p, Node):
            return self.node(p, n, user)
        if isinstance(p, (list, tuple)):
            same = isinstance(n, (list, tuple)) and len(p) == len(n)
            if not same:
                return self.fail(user, f"has arguments {n}, the pattern has {p}")
            return all(self.argument(a, b, user) for a, b in zip(p, n, strict=True))
        if isinstance(p, dict):
            keys = {k for k in {*p, *n} if p.get(k) != n.get(k)} if isinstance(n, dict) else {"arguments"}
            return not keys or self.fail(user, f"differs from the pattern in {', '.join(sorted(keys))}")
        for name, example in self.pattern.scalars.items():
            if isinstance(p, float) and p == example:
                if not isinstance(n, (int, float)):
                    return self.fail(user, f"has {n!r} for {name}, which must be a number")
                known = self.scalars.setdefault(name, n)
                return known == n or self.fail(user, f"has {name}={n}, elsewhere in the pattern it is {known}")
        if isinstance(p, int) and not isinstance(p, bool) and p >= HOLE:
            known = self.sizes.setdefault(p, n)
            return known == n or self.fail(user, f"has size {n}, elsewhere in the pattern it is {known}")
        return bool(p == n) or self.fail(user, f"has {n!r} in {_name(user.target)}, the pattern has {p!r}")


def _name(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))
