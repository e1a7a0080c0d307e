"""Let experts read their stacked weights as they are stored.

before: y = grouped_linear(x, reshape(dequantize_weight(flatten(w), flatten(s), …)), order, starts, top_k, bias)
after:  xq, xs = quantize(x); y = grouped_scaled_linear(xq, xs, w, s, order, starts, top_k, dtype, bias)
Experts whose form no kernel serves keep dequantized weights, computed at load, and are misses.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from seamwise.kernels import dequantize_weight, grouped_linear, grouped_scaled_linear, quantize
from seamwise.passes.graph import aten, inserting, is_op, place, replace, value
from seamwise.passes.matcher import Miss
from seamwise.passes.rewrite import Pass, Report

from .quantize_linear import ACTIVATIONS, BLOCK, why_unserved


def quantize_experts(module: GraphModule, report: Report) -> None:
    """Rewrite every grouped linear layer over dequantized weights; what cannot be served is a miss."""
    for node in list(module.graph.find_nodes(op="call_function", target=grouped_linear.op)):
        plain = _dequantized(node.args[1])
        if plain is None:
            continue
        stored, scale = (flat.args[0] for flat in plain.args[:2])  # type: ignore[union-attr]
        format, _, columns = form = plain.args[3:6]
        quantizes_input = bool(stored.meta["quantizes_input"])  # type: ignore[union-attr]
        reason = why_unserved(form, plain.args[2] is not None, quantizes_input)  # type: ignore[arg-type]
        if reason is not None or format == "int4" or not quantizes_input:
            report.misses.append(Miss(place(node), node.name, reason or f"{format} weights of experts have no kernel"))
            continue
        x, _, order, starts, top_k, *bias = node.args
        with inserting(module.graph, node, like=node) as proxy:
            both = quantize(proxy(x), ACTIVATIONS[format], BLOCK if columns else 0)  # type: ignore[index]
            q, s = (operator.getitem(both, i) for i in range(2))
            given = [proxy(b) if isinstance(b, Node) else b for b in bias]
            y = grouped_scaled_linear(
                q, s, proxy(stored), aten.to.dtype(proxy(scale), torch.float32), proxy(order), proxy(starts), top_k,  # type: ignore[arg-type]
                value(node).dtype, *given,
            )  # fmt: skip
        replace(node, y.node)
        module.graph.erase_node(node)
        report.matched += 1


def _dequantized(weight: Any) -> Node | None:
    inner = weight.args[0] if is_op(weight, aten.reshape.default) else None
    return inner if is_op(inner, dequantize_weight.op) else None


QUANTIZE_EXPERTS = Pass(name="quantize_experts", rewrite=quantize_experts, lossy=True)  # inputs are quantized too
