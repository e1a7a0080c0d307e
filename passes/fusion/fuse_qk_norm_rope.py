"""Norm and rotate the query and key heads of a joint projection in one kernel.

before: q = rope(rms_norm(reshape(y[:, :H·D]), wq, eps), cos, sin); k = rope(rms_norm(reshape(y[:, H·D:]), wk, eps), …)
after:  q, k = qk_norm_rope(y, wq, wk, cos, sin, H, K, eps)
Saves two writes and two reads of q and k (Qwen 3, Gemma 3).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from seamwise.kernels import qk_norm_rope, rms_norm, rope
from seamwise.passes.graph import VIEWS, aten, given, inserting, is_op, place, replace, value
from seamwise.passes.matcher import Excuse, Miss
from seamwise.passes.quantization.quantize_linear import storage_of
from seamwise.passes.rewrite import Pass, Report


@dataclass(slots=True)
class _Branch:
    """One rotated and normed group of heads: its nodes, and the joint tensor's columns that it starts from."""

    rotated: Node
    norm: Node
    joint: Node
    first: int
    last: int


def fuse(module: GraphModule, report: Report) -> None:
    """Join query and key branches over one joint tensor; a branch whose partner does not fit is a miss."""
    waiting: dict[Node, _Branch] = {}
    for node in list(module.graph.find_nodes(op="call_function", target=rope.op)):
        branch = _branch(node)
        if isinstance(branch, str):
            report.misses.append(Miss(place(node), node.name, branch))
        elif branch is not None and (query := waiting.pop(branch.joint, None)) is None:
            waiting[branch.joint] = branch
        elif branch is not None and query is not None:
            if (reason := _why_not(query, branch) or _read_before(query, branch)) is not None:
                report.misses.append(Miss(place(node), node.name, reason))
            else:
                _replace(module, query, branch)
                report.matched += 1


def _branch(node: Node) -> _Branch | str | None:
    """Return the branch that ends in a rope, why it cannot be part of one, or None when nothing is normed."""
    norm = _behind(given(node).x_THD)
    if not is_op(norm, rms_norm.op):
        return None
    cut = _behind(given(norm).x_TD, stop=aten.slice.Tensor)
    if not is_op(cut, aten.slice.Tensor) or given(cut).dim not in (-1, value(cut).dim() - 1):
        reason = "its heads are not columns of a joint projection"
        return Excuse(reason) if _stored_apart(cut) else reason
    return _Branch(node, norm, given(cut).self, given(cut).start, given(cut).end)


def _stored_apart(made: Any) -> bool:
    """Return whether this is the first of several projections whose weights are stored too differently to join."""
    if not is_op(made, aten.linear.default):
        return False
    siblings = [given(u).weight for u in given(made).input.users if is_op(u, aten.linear.default)]
    apart = len({*map(storage_of, siblings)}) > 1
    return apart and given(made).weight is siblings[0]


def _behind(node: Any, stop: object = None) -> Any:
    """Return what a chain of views looks at; `stop` is a view to stop at."""
    while isinstance(node, Node) and node.target in VIEWS and node.target is not stop:
        node = node.args[0]
    return node


def _why_not(q: _Branch, k: _Branch) -> str | None:
    if q.first != 0 or k.first != q.last:
        return f"query columns {q.first}:{q.last} and key columns {k.first}:{k.last} do not adjoin at the start"
    turned, also = given(q.rotated), given(k.rotated)
    if (turned.cos_TR, turned.sin_TR) != (also.cos_TR, also.sin_TR) or turned.interleaved or also.interleaved:
        return "queries and keys are rotated by different tables, or in interleaved pairs"
    if given(q.norm).eps != given(k.norm).eps:
        return f"queries are normed with eps {given(q.norm).eps}, keys with {given(k.norm).eps}"
    for part in (q, k):
        heads = value(part.rotated)
        if value(part.norm).shape[-1] != heads.shape[-1]:
            return f"{part.norm.name} norms rows of {value(part.norm).shape[-1]}, wanted heads of {heads.shape[-1]}"
        if heads.dim() != 3 or (part.last - part.first) != heads.shape[1] * heads.shape[2]:
            return f"heads {tuple(heads.shape)} are not the columns {part.first}:{part.last} in order"
    return None


def _read_before(q: _Branch, k: _Branch) -> str | None:
    """Return which reader of q stands before k's rope, where both are made, or None."""
    early = [u.name for u in q.rotated.users if u < k.rotated]
    return f"{early[0]} reads the queries before the keys are made" if early else None


def _replace(module: GraphModule, q: _Branch, k: _Branch) -> None:
    with inserting(module.graph, k.rotated, like=k.rotated) as proxy:
        joint = proxy(q.joint)
        rows = joint if value(q.joint).dim() == 2 else aten.select.int(joint, 0, 0)
        weights = proxy(given(q.norm).weight_D), proxy(given(k.norm).weight_D)
        tables = proxy(given(q.rotated).cos_TR), proxy(given(q.rotated).sin_TR)
        heads = value(q.rotated).shape[1], value(k.rotated).shape[1]
        both = qk_norm_rope(rows, *weights, *tables, *heads, given(q.norm).eps)
        parts = operator.getitem(both, 0), operator.getitem(both, 1)
    for branch, part in zip((q, k), parts, strict=True):
        replace(branch.rotated, part.node)


FUSE_QK_NORM_ROPE = Pass(name="fuse_qk_norm_rope", rewrite=fuse, expect=lambda s, _: s.qk_norms)
