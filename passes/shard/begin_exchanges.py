"""Begin to send rows as soon as they are there, end it where they are read, and compute what needs none meanwhile.

before: shared = mlp(x); …; rows, e = ep_dispatch(x, …); h = grouped_linear(rows, …)      shared may stand behind too
after:  …; t = ep_dispatch_begin(x, …); shared = mlp(x); rows, e = ep_dispatch_end(t, x, …); h = grouped_linear(rows, …)
What is moved reads and gives the same: nothing that writes, sends or is a seam is moved, nor beyond one. An
`ep_combine` is cut in two as well, so that another batch may compute between the halves.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from seamwise.kernels import ep_combine, ep_dispatch, ep_dispatch_quant
from seamwise.kernels.contract import contract_of
from seamwise.passes.graph import inserting, is_getitem, replace, writes
from seamwise.passes.promises import calls
from seamwise.passes.rewrite import Pass, Report

_HALVES = torch.ops.seamwise_exchange
_WHOLE = (ep_dispatch, ep_dispatch_quant, ep_combine)


def rewrite(module: GraphModule, report: Report) -> None:
    """Cut every exchange in two, and put between the halves of a dispatch what need not stand before or behind."""
    for record in _WHOLE:
        for node in list(module.graph.find_nodes(op="call_function", target=record.op)):
            begin, end = _cut(module, node, record.name)
            if record is not ep_combine:
                _fill(begin, end)
            report.matched += 1


def _cut(module: GraphModule, node: Node, name: str) -> tuple[Node, Node]:
    with inserting(module.graph, node, like=node) as proxy:
        given = [*map(proxy, node.args)]
        # How they travel is decided where providers are chosen.
        ticket = getattr(_HALVES, f"{name}_begin").default(*given, "")
        made = getattr(_HALVES, f"{name}_end").default(ticket, *given)
    for item in list(node.users):
        if is_getitem(item):
            item.replace_input_with(node, made.node)
    replace(node, made.node)
    return ticket.node, made.node


def _fill(begin: Node, end: Node) -> None:
    """Move between the halves what stands before the first and nothing needs until then, and what behind could."""
    late: dict[Node, None] = {}
    node = begin.prev
    while _moves(node):
        if node.users and all(u in late or u > begin for u in node.users):
            late[node] = None
        node = node.prev
    early: dict[Node, None] = {}
    node = end.next
    while _moves(node):
        if all(source in early or source < begin for source in node.all_input_nodes):
            early[node] = None
        node = node.next
    for moved in (*reversed(late), *early):
        end.prepend(moved)


def _moves(node: Any) -> bool:
    """Return whether a node may be moved, or be moved over."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True
    record, space = contract_of(node.target), getattr(node.target, "namespace", "")
    sends = "comm" in getattr(record and record.meaning, "__module__", "").split(".")
    return not (writes(node) or sends or (record and record.seam) or space in ("seamwise_exchange", "_c10d_functional"))


BEGIN_EXCHANGES = Pass(
    name="begin_exchanges", rewrite=rewrite,
    expect=lambda _, module: 2 * len(calls(module, ep_dispatch, ep_dispatch_quant)),
)  # fmt: skip
