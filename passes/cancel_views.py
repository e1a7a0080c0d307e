"""Drop views that undo each other: what is left of a batch of one between transformers' code and our ops.

before: select(unsqueeze(x, 0), 0, 0)    squeeze(unsqueeze(x, 0), 0)    transpose(transpose(x, a, b), a, b)
after:  x
before: unsqueeze(select(x, 0, 0), 0), for x of a first size 1
after:  x
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from .graph import aten, is_op, replace, value
from .rewrite import Pass, Report


def cancel(module: GraphModule, report: Report) -> None:
    """Let every user of such a pair read what the inner view looks at."""
    for node in list(module.graph.nodes):
        inner = node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(inner, Node) or inner.op != "call_function" or not _undoes(node, inner):
            continue
        replace(node, inner.args[0])  # type: ignore[arg-type]
        report.matched += 1


def _undoes(node: Node, inner: Node) -> bool:
    if is_op(node, aten.transpose.int) and is_op(inner, aten.transpose.int):
        rank = value(node).dim()
        return _dims(node, rank) == _dims(inner, rank)
    if is_op(inner, aten.unsqueeze.default) and _first(inner, inner):
        taken = is_op(node, aten.select.int) and node.args[2] == 0
        return (taken or is_op(node, aten.squeeze.dim)) and _first(node, inner)
    taken = is_op(inner, aten.select.int) and inner.args[2] == 0
    if not taken or not is_op(node, aten.unsqueeze.default):
        return False
    source = inner.args[0]
    assert isinstance(source, Node)
    return value(source).shape[0] == 1 and _first(inner, source) and _first(node, node)


def _dims(node: Node, rank: int) -> set[int]:
    dims: tuple[Any, ...] = node.args[1:]
    return {a % rank for a in dims}


def _first(node: Node, counted_on: Node) -> bool:
    """Return whether a view's dimension is the first of the other node's."""
    dim: Any = node.args[1]
    return bool(dim % value(counted_on).dim() == 0)


CANCEL_VIEWS = Pass(name="cancel_views", rewrite=cancel)
