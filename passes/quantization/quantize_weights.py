"""Quantize the weights of linear layers at load: `quantization="fp8"` and its like.

before: y = linear(x, w, bias)
after:  s = weight_scale(w); y = linear(x, dequantize_weight(quantize_weight(w, s), s), bias)
Nothing is saved yet: `quantize_linear` gives the layer a kernel that reads the quantized weight, or says why not. The
head and routers keep their weights, as in vLLM: they take the rounding worst and are a small part.
Source: https://docs.vllm.ai/en/latest/features/quantization/fp8.html.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from seamwise.kernels import dequantize_weight, quantize_weight, weight_scale
from seamwise.passes.graph import aten, given, inserting, is_op, is_weight, place, value
from seamwise.passes.rewrite import Pass, rewrite_each


@dataclass(frozen=True, slots=True)
class Scheme:
    """How weights are stored: the format, and the rows and columns that share a scale (0: all)."""

    format: str
    rows: int
    columns: int


SCHEMES = {
    "fp8": Scheme("float8_e4m3fn", 1, 0),
    "fp8_block": Scheme("float8_e4m3fn", 128, 128),
    "int8": Scheme("int8", 1, 0),
    "w4a16": Scheme("int4", 1, 128),
}


# Name of a module, the last part of its path -> what it is.
KEPT = {"": "the head", "lm_head": "the head", "gate": "a router", "router": "a router"}


def quantize_weights(scheme: Scheme) -> Pass:
    """Return the pass that quantizes every linear layer's weight but the head's and routers'."""

    def quantize(node: Node) -> str | None:
        if (reason := _why_not(node)) is not None:
            return reason
        weight = given(node).weight
        width, dtype = value(weight).shape[1], value(weight).dtype
        form = (scheme.format, scheme.rows, scheme.columns)
        # Ahead of every call, where a pass that joins weights finds all of them.
        first = next(n for n in node.graph.nodes if n.op == "call_function" and not is_weight(n))
        with inserting(node.graph, first, like=node) as proxy:
            scale = weight_scale(proxy(weight), *form)
            stored = quantize_weight(proxy(weight), scale, *form)
            plain = dequantize_weight(stored, scale, None, *form, width, dtype)
        node.update_arg(1, plain.node)
        return None

    return rewrite_each(
        "quantize_weights", aten.linear.default, one=quantize, expect=lambda s, _: s.linears, lossy=True
    )  # fmt: skip


def _why_not(node: Node) -> str | None:
    weight = given(node).weight
    name = place(node).rpartition(".")[2]
    if name in KEPT:
        return f"it is {KEPT[name]}, which keeps its weight"
    if not is_weight(weight):
        return "its weight is computed in the step"
    if any(is_op(n, dequantize_weight.op) for n in weight.all_input_nodes):
        return "its weight is quantized already"
    return None
