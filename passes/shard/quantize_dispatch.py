"""Quantize a row before it travels to its experts, not behind.

before: rows, e = ep_dispatch(x, experts, E, group); q, s = quantize(rows, dtype, group, scale)
after:  qx, sx = quantize(x, dtype, group, scale); q, s, e = ep_dispatch_quant(qx, sx, experts, E, group)
A row is quantized by itself, so it is the same; D + 4·G bytes travel instead of 2·D, and it is quantized once, not on
every rank that it goes to. Where rows are read as they are too, they travel as they are.
"""

from __future__ import annotations

import operator

from torch.fx import Node

from seamwise.kernels import ep_dispatch, ep_dispatch_quant, quantize
from seamwise.passes.graph import inserting, is_op, replace_results
from seamwise.passes.promises import calls, quantized_mlps
from seamwise.passes.rewrite import rewrite_each


def rewrite(node: Node) -> str | None:
    """Rewrite a dispatch whose rows are quantized, and read in no other way."""
    readers = [u for item in node.users if item.args[1] == 0 for u in item.users]
    if len(readers) != 1 or not is_op(readers[0], quantize.op):
        return f"its rows are read by {', '.join(str(u.target) for u in readers)}, wanted one quantize"
    behind = readers[0]
    x, experts, *rest = node.args
    with inserting(node.graph, node, like=node) as proxy:
        both = quantize(proxy(x), *map(proxy, behind.args[1:]))
        sent = ep_dispatch_quant(operator.getitem(both, 0), operator.getitem(both, 1), proxy(experts), *rest)
        q, s, sent_experts = (operator.getitem(sent, i) for i in range(3))
    replace_results(behind, {0: q, 1: s})
    replace_results(node, {1: sent_experts})
    return None


QUANTIZE_DISPATCH = rewrite_each(
    "quantize_dispatch", ep_dispatch.op, one=rewrite,
    expect=lambda _, module: min(len(calls(module, ep_dispatch)), quantized_mlps(module)),
)  # fmt: skip
