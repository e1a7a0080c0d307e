"""Let experts read their stacked weights as they are stored.

before: y = grouped_linear(x, reshape(dequantize_weight(flatten(w), flatten(s), …)), order, starts, top_k, bias)
after:  xq, xs = quantize(x); y = grouped_scaled_linear(xq, xs, w, s, order, starts, top_k, dtype, bias)
        y = grouped_linear_int(x, pack_int_panels(flatten(w)), …)    integers, where inputs stay as they are, on CPUs
Experts whose form no kernel serves keep dequantized weights, computed at load, and are misses.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from seamwise.kernels import dequantize_weight, grouped_linear, grouped_linear_int, grouped_scaled_linear, quantize
from seamwise.passes.graph import arguments, aten, given, inserting, is_op, replace, value
from seamwise.passes.pack_linear import int_arguments, replaced_by
from seamwise.passes.rewrite import rewrite_each

from .quantize_linear import BLOCK, keeps_input, why_unserved


def quantize_experts(node: Node) -> str | None:
    """Let a grouped linear layer over dequantized weights read them as they are stored."""
    plain = given(_dequantized(node))
    stored, scale = (flat.args[0] for flat in (plain.stored, plain.scale))
    quantizes_input = bool(stored.meta["quantizes_input"])
    reason = why_unserved((plain.format, plain.rows, plain.columns), plain.zero is not None, quantizes_input)
    if reason is not None or keeps_input(plain.format, quantizes_input):
        return reason or _read_integers(node, plain)
    x, _, order, starts, top_k, *bias = node.args
    with inserting(node.graph, node, like=node) as proxy:
        both = quantize(proxy(x), getattr(torch, plain.format), BLOCK if plain.columns else 0)
        q, s = (operator.getitem(both, i) for i in range(2))
        y = grouped_scaled_linear(
            q, s, proxy(stored), aten.to.dtype(proxy(scale), torch.float32), proxy(order), proxy(starts), top_k,
            value(node).dtype, *map(proxy, bias),
        )  # fmt: skip
    replace(node, y.node)
    return None


def _read_integers(node: Node, plain: Any) -> str | None:
    x, weight, *rest = arguments(node)
    is_point = plain.zero is not None and not value(plain.zero).is_floating_point()

    def packed_arguments(x: Any, stored: Any, scale: Any, zero: Any, *rest: Any) -> Any:
        given = x, stored, aten.to.dtype(scale, torch.float32), zero, plain.columns, None
        return *int_arguments(value(weight).shape[1:], is_point, *given)[:-1], *rest

    reason = replaced_by(node, grouped_linear_int, packed_arguments, x, plain.stored, plain.scale, plain.zero, *rest)
    return reason and f"no kernel reads {plain.format} weights of these experts: {reason}"


def _dequantized(node: Node) -> Any:
    weight = node.args[1]
    inner = weight.args[0] if is_op(weight, aten.reshape.default) else None  # type: ignore[union-attr]
    return inner if is_op(inner, dequantize_weight.op) else None


QUANTIZE_EXPERTS = rewrite_each(
    "quantize_experts", grouped_linear.op, one=quantize_experts, wanted=lambda node: _dequantized(node) is not None,
    lossy=True,  # inputs are quantized too
)  # fmt: skip
