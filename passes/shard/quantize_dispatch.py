"""Quantize a row before it travels to its experts, not behind.

before: rows, e = ep_dispatch(x, experts, E, group); q, s = quantize(rows, dtype, group, scale)
after:  qx, sx = quantize(x, dtype, group, scale); q, s, e = ep_dispatch_quant(qx, sx, experts, E, group)
A row is quantized by itself, so it is the same; D + 4·G bytes travel instead of 2·D, and it is quantized once, not on
every rank that it goes to. Where rows are read as they are too, they travel as they are.
"""

from __future__ import annotations

import operator

from torch.fx import GraphModule, Node

from seamwise.kernels import ep_dispatch, ep_dispatch_quant, quantize
from seamwise.passes.graph import inserting, is_op, place, replace
from seamwise.passes.matcher import Miss
from seamwise.passes.rewrite import Pass, Report


def rewrite(module: GraphModule, report: Report) -> None:
    """Rewrite every dispatch whose rows are quantized; one whose rows are read as they are is a miss."""
    for node in list(module.graph.find_nodes(op="call_function", target=ep_dispatch.op)):
        readers = [u for item in node.users if item.args[1] == 0 for u in item.users]
        if len(readers) != 1 or not is_op(readers[0], quantize.op):
            names = ", ".join(str(u.target) for u in readers)
            report.misses.append(Miss(place(node), node.name, f"its rows are read by {names}, wanted one quantize"))
            continue
        _rewrite(module, node, readers[0])
        report.matched += 1


def _rewrite(module: GraphModule, node: Node, behind: Node) -> None:
    x, experts, *rest = node.args
    assert isinstance(x, Node) and isinstance(experts, Node)
    with inserting(module.graph, node, like=node) as proxy:
        how = [proxy(a) if isinstance(a, Node) else a for a in behind.args[1:]]
        both = quantize(proxy(x), *how)
        sent = ep_dispatch_quant(operator.getitem(both, 0), operator.getitem(both, 1), proxy(experts), *rest)
        results = [operator.getitem(sent, i).node for i in range(3)]
    for item in list(behind.users):
        replace(item, results[item.args[1]])  # type: ignore[index]
    for item in [i for i in node.users if i.args[1] == 1]:
        replace(item, results[2])


QUANTIZE_DISPATCH = Pass(
    name="quantize_dispatch", rewrite=rewrite, expect=lambda s: min(s.exchanges, s.quantized_experts)
)
