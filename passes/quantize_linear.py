"""Let linear layers read their weights as they are stored.

before: y = linear(x, dequantize_weight(q, s), bias)         or a cat of such weights along their rows
after:  y = w4a16_linear(x, q, s, zero, group, bias)         int4 weights
        xq, xs = quantize(x); y = scaled_linear(xq, xs, q, s, dtype, bias)      float8 and int8 weights
A layer whose form no kernel serves keeps its dequantized weight, computed at load, and is a miss. Equal quantizations
of one x are one node.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node, Proxy

from seamwise.kernels import dequantize_weight, quantize, scaled_linear, w4a16_linear

from .graph import aten, inserting, is_op, place, replace, value
from .matcher import Miss
from .rewrite import Pass, Report

BLOCK = 128
_ACTIVATIONS = {"float8_e4m3fn": torch.float8_e4m3fn, "int8": torch.int8}


def quantize_linears(module: GraphModule, report: Report) -> None:
    """Rewrite every linear layer over dequantized weights; what cannot be served is a miss."""
    quantized: dict[tuple[Any, ...], Node] = {}
    for node in list(module.graph.find_nodes(op="call_function", target=aten.linear.default)):
        parts = _parts(node.args[1])
        if parts is None:
            continue
        if (reason := _why_not(parts) or _shape(node.args[0])) is not None:
            report.misses.append(Miss(place(node), node.name, reason))
            continue
        _rewrite(module, node, parts, quantized)
        report.matched += 1


def _parts(weight: Any) -> list[Node] | None:
    """Return the dequantized weights that a weight joins, or None when it is not made of such."""
    if is_op(weight, dequantize_weight.op):
        return [weight]
    if is_op(weight, aten.cat.default) and len(weight.args) < 3 and (len(weight.args) == 1 or weight.args[1] == 0):
        parts = list(weight.args[0])
        return parts if all(is_op(p, dequantize_weight.op) for p in parts) else None
    return None


def _why_not(parts: list[Node]) -> str | None:
    forms = {tuple(p.args[3:7]) for p in parts}
    if len(forms) > 1:
        return f"it joins weights stored in different forms: {', '.join(map(str, sorted(forms)))}"
    _, _, zero, format, rows, columns, _, _ = parts[0].args
    if len({p.args[2] is None for p in parts}) > 1:
        return "it joins weights with and without zero points"
    heights = [value(p).shape[0] for p in parts]
    if rows > 1 and any(n % rows for n in heights[:-1]):
        return f"it joins weights of {heights} rows, whose blocks of {rows} do not meet"
    if format == "int4":
        return None if rows == 1 else f"int4 weights share a scale over {rows} rows, wanted 1"
    if zero is not None:
        return f"{format} weights with zero points have no kernel"
    served = {(1, 0), (0, 0), (BLOCK, BLOCK)}
    return None if (rows, columns) in served else f"scales of blocks of ({rows}, {columns}) have no kernel"


def _shape(x: Any) -> str | None:
    shape = value(x).shape
    return None if len(shape) == 2 or (len(shape) == 3 and shape[0] == 1) else f"its input is {tuple(shape)}"


def _rewrite(module: GraphModule, node: Node, parts: list[Node], quantized: dict[tuple[Any, ...], Node]) -> None:
    _, _, zero, format, rows, columns, _, _ = parts[0].args
    x, bias = node.args[0], node.args[2] if len(node.args) > 2 else None
    with inserting(module.graph, node, like=node) as proxy:

        def joined(tensors: list[Proxy]) -> Proxy:
            return aten.cat.default(tensors, 0) if len(tensors) > 1 else tensors[0]

        def argument(at: int) -> Proxy:
            return joined([proxy(p.args[at]) for p in parts])  # type: ignore[arg-type]

        batched = value(x).dim() == 3  # type: ignore[arg-type]

        def rows_of(given: Proxy) -> Proxy:
            return aten.squeeze.dim(given, 0) if batched else given

        given_bias = None if bias is None else proxy(bias)  # type: ignore[arg-type]
        if format == "int4":
            zeros = None if zero is None else argument(2)
            y = w4a16_linear(rows_of(proxy(x)), argument(0), argument(1), zeros, columns, given_bias)
        else:
            scale = argument(1)
            if rows == 0 and len(parts) > 1:  # one scale a tensor becomes one a channel
                scales = [aten.expand.default(proxy(p.args[1]), [value(p).shape[0], 1]) for p in parts]  # type: ignore[arg-type]
                scale = joined(scales)
            key = (x, format, columns)
            if key not in quantized:
                both = quantize(proxy(x), _ACTIVATIONS[format], BLOCK if columns else 0)  # type: ignore[arg-type,index]
                quantized[key] = both.node
            q, s = (rows_of(operator.getitem(proxy(quantized[key]), i)) for i in range(2))
            y = scaled_linear(q, s, argument(0), scale, value(node).dtype, given_bias)
        y = aten.unsqueeze.default(y, 0) if batched else y
    replace(node, y.node)
    module.graph.erase_node(node)


QUANTIZE_LINEAR = Pass(
    name="quantize_linear",
    lossy=True,  # inputs are quantized too
    rewrite=quantize_linears,  # after the joins: three linears are one by then, or two
    expect=lambda s: s.quantized_linears - 2 * s.attentions - s.gate_up_pairs if s.quantized_linears else 0,
)
