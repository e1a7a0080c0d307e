"""Choose each token's experts and quantize its row for them in one launch.

before: w, e = moe_route(linear(x, router), …); q, s = quantize(x, dtype, group, scale); h = grouped_scaled_linear(q, …)
after:  w, e, q, s = moe_route_quant(x, linear(x, router), dtype, group, …, scale); h = …
The norm cannot quantize x, which the router reads as it is. Saves a launch a layer, and rows are quantized while others
are routed, which takes longer. Equal quantizations of x, as shared experts have one, become the same.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import GraphModule, Node

from seamwise.kernels import ep_dispatch_quant, grouped_scaled_linear, moe_route, moe_route_quant, quantize
from seamwise.passes.graph import VIEWS, arguments, aten, given, inserting, is_op, place, replace_results
from seamwise.passes.matcher import Miss
from seamwise.passes.promises import calls, quantized_mlps
from seamwise.passes.rewrite import Pass, Report


def fuse(module: GraphModule, report: Report) -> None:
    """Rewrite every routing to experts that read quantized rows; one whose router reads other rows is a miss."""
    experts = module.graph.find_nodes(op="call_function", target=grouped_scaled_linear.op)
    of_experts = [_before_sending(layer.args[0].args[0]) for layer in experts]
    for route in list(module.graph.find_nodes(op="call_function", target=moe_route.op)) if experts else []:
        logits = given(route).logits_TE
        rows = _rows(given(logits).input) if is_op(logits, aten.linear.default) else None
        node = next((q for q in of_experts if is_op(q, quantize.op) and _rows(given(q).x_TD) is rows), None)
        if node is None:
            read = f"of {logits}" if rows is None else f"of a linear layer of {rows}"
            report.misses.append(Miss(place(route), route.name, f"it routes by logits {read}, which no expert reads"))
            continue
        _rewrite(module, route, [node, *(q for q in _equal(module, node) if q is not node)])
        report.matched += 1


def _before_sending(made: Any) -> Any:
    """Return what quantized the rows that experts read: here, where they were sent."""
    return made.args[0].args[0] if is_op(made, ep_dispatch_quant.op) else made


def _rows(x: Any) -> Any:
    """Return what x is a view or another dtype of."""
    while is_op(x, *VIEWS, aten.to.dtype):
        x = x.args[0]
    return x


def _equal(module: GraphModule, node: Node) -> list[Node]:
    found = module.graph.find_nodes(op="call_function", target=quantize.op)
    return [q for q in found if arguments(q) == arguments(node)]


def _rewrite(module: GraphModule, route: Node, quantizes: list[Node]) -> None:
    (logits, *how), (x, dtype, group, scale) = arguments(route), arguments(quantizes[0])
    first = min(route, *quantizes)
    with inserting(module.graph, first, like=route) as proxy:
        all_results = moe_route_quant(*map(proxy, (x, logits, dtype, group, *how, scale)))
        weights, experts, q, s = (operator.getitem(all_results, i) for i in range(4))
    replace_results(route, {0: weights, 1: experts})
    for one in quantizes:
        replace_results(one, {0: q, 1: s})


FUSE_MOE_ROUTE_QUANT = Pass(
    name="fuse_moe_route_quant", rewrite=fuse,
    expect=lambda _, module: min(quantized_mlps(module), len(calls(module, moe_route))),
)  # fmt: skip
