"""Let linear layers read their weights as they are stored.

before: y = linear(x, dequantize_weight(q, s), bias)         or a cat of such weights along their rows
after:  y = w4a16_linear(x, q, s, zero, group, bias)         int4 weights, and int8 ones whose inputs stay as they are
        xq, xs = quantize(x); y = scaled_linear(xq, xs, q, s, dtype, bias)      float8 and int8 weights
A checkpoint may hold the scale that a layer's input is quantized with; joined layers take their largest one.
Joined layers whose blocks do not meet are multiplied one by one. A layer whose form no kernel serves keeps its
dequantized weight, computed at load, and is a miss. Equal quantizations of one x are one node.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, Proxy

from seamwise.kernels import dequantize_weight, quantize, scaled_linear, w4a16_linear
from seamwise.passes.graph import aten, given, inserting, is_op, is_weight, place, replace, value
from seamwise.passes.matcher import Excuse, Miss
from seamwise.passes.rewrite import Pass, Report

BLOCK = 128


def quantize_linears(module: GraphModule, report: Report) -> None:
    """Rewrite every linear layer over dequantized weights; what cannot be served is a miss."""
    quantized: dict[tuple[Any, ...], Node] = {}
    for node in list(module.graph.find_nodes(op="call_function", target=aten.linear.default)):
        parts = _parts(given(node).weight)
        if parts is None:
            continue
        if (reason := _why_not(parts) or _shape(given(node).input)) is not None:
            report.misses.append(Miss(place(node), node.name, reason))
            continue
        _rewrite(node, parts, quantized)
        report.matched += 1


def _promised(module: GraphModule) -> int:
    """Return how many linear layers read quantized weights: every one is to read them as they are stored."""
    layers = module.graph.find_nodes(op="call_function", target=aten.linear.default)
    return sum(_parts(given(layer).weight) is not None for layer in layers)


def _parts(weight: Any) -> list[Node] | None:
    """Return the weights that a weight joins, any of them dequantized, or None when none is."""
    joined = is_op(weight, aten.cat.default) and (len(weight.args) < 2 or weight.args[1] == 0)
    parts = list(weight.args[0]) if joined else [weight]
    return parts if any(is_op(p, dequantize_weight.op) for p in parts) else None


def why_unserved(form: tuple[str, int, int], has_zero: bool, quantizes_input: bool) -> str | None:
    """Return why no kernel reads a weight of this format whose scales serve blocks of (rows, columns), or None."""
    format, rows, columns = form
    if keeps_input(format, quantizes_input):
        return None if rows == 1 else f"{format} weights share a scale over {rows} rows, wanted 1"
    if not quantizes_input:
        return f"{format} weights have no kernel for inputs that stay as they are"
    if has_zero:
        return f"{format} weights with zero points have no kernel"
    served = {(1, 0), (0, 0), (BLOCK, BLOCK)}
    return None if (rows, columns) in served else f"scales of blocks of ({rows}, {columns}) have no kernel"


def keeps_input(format: str, quantizes_input: bool) -> bool:
    """Return whether integers of a format are read beside inputs that are not quantized."""
    return format == "int4" or (format == "int8" and not quantizes_input)


def storage_of(weight: Any) -> Hashable:
    """Return how a weight is stored, and its layer's input read: equal ones may be joined. None: as it is."""
    if not is_op(weight, dequantize_weight.op):
        return None
    return (*_form(weight), _zeros(weight), _quantizes_input(weight), _input_scale(weight) is None)


def _form(part: Node) -> tuple[str, int, int]:
    """Return the format of a stored weight, and the rows and columns that share a scale."""
    return given(part).format, given(part).rows, given(part).columns


def _zeros(part: Node) -> bool | None:
    """Return whether a stored weight's zeros are offsets (floating) rather than points; None where it has none."""
    zero = given(part).zero
    return None if zero is None else value(zero).is_floating_point()


def why_apart(parts: Sequence[Any]) -> str | None:
    """Return why these weights, joined along their rows, could not be read as they are stored, or None."""
    stored = [p for p in parts if is_op(p, dequantize_weight.op)]
    return _why_not_joined(parts) if stored else None


def _why_not(parts: list[Node]) -> str | None:
    if why := _why_not_joined(parts):
        return why
    why = why_unserved(_form(parts[0]), _zeros(parts[0]) is not None, _quantizes_input(parts[0]))
    return None if why is None else Excuse(why)


def _why_not_joined(parts: Sequence[Node]) -> str | None:
    if plain := [p.name for p in parts if not is_op(p, dequantize_weight.op)]:
        return f"it joins quantized weights with {', '.join(plain)}, which is not quantized"
    forms = {*map(_form, parts)}
    if len(forms) > 1:
        return f"it joins weights stored in different forms: {', '.join(map(str, sorted(forms)))}"
    if len({*map(_zeros, parts)}) > 1:
        return "it joins weights with and without zero points, or with offsets"
    inputs = {(_quantizes_input(p), _input_scale(p) is None) for p in parts}
    if len(inputs) > 1:
        return "it joins weights whose inputs are quantized in different ways"
    return None


def _quantizes_input(part: Node) -> bool:
    return bool(given(part).stored.meta.get("quantizes_input", True))


def _input_scale(part: Node) -> Node | None:
    scale: Node | None = given(part).stored.meta.get("input_scale")
    return scale


def _shape(x: Any) -> str | None:
    shape = value(x).shape
    return None if len(shape) == 2 or (len(shape) == 3 and shape[0] == 1) else f"its input is {tuple(shape)}"


def _rewrite(node: Node, parts: list[Node], quantized: dict[tuple[Any, ...], Node]) -> None:
    format, rows, columns = _form(parts[0])
    x, bias = given(node).input, given(node).bias
    key = (x, format, columns, *map(_input_scale, parts))
    stays = keeps_input(format, _quantizes_input(parts[0]))
    if not stays and key not in quantized:
        static = _joined_input_scale(node.graph, parts)
        with inserting(node.graph, node, like=node) as proxy:
            both = quantize(proxy(x), getattr(torch, format), BLOCK if columns else 0, proxy(static))
            quantized[key] = both.node
    with inserting(node.graph, node, like=node) as proxy:

        def joined(tensors: list[Proxy]) -> Proxy:
            return aten.cat.default(tensors, 0) if len(tensors) > 1 else tensors[0]

        batched = value(x).dim() == 3

        def rows_of(given: Proxy) -> Proxy:
            return aten.squeeze.dim(given, 0) if batched else given

        stored = [proxy(given(p).stored) for p in parts]
        # a checkpoint's scales may have any floating dtype
        scales = [aten.to.dtype(proxy(given(p).scale), torch.float32) for p in parts]
        if stays:
            zeros = None if _zeros(parts[0]) is None else joined([proxy(given(p).zero) for p in parts])
            y = w4a16_linear(rows_of(proxy(x)), joined(stored), joined(scales), zeros, columns, proxy(bias))
        else:
            if rows == 0 and len(parts) > 1:  # one scale a tensor becomes one a channel
                scales = [aten.expand.default(s, [value(p).shape[0], 1]) for s, p in zip(scales, parts, strict=True)]
            q, s = (rows_of(operator.getitem(proxy(quantized[key]), i)) for i in range(2))
            dtype, ends = value(node).dtype, list(itertools.accumulate(value(p).shape[0] for p in parts))
            if rows > 1 and any(end % rows for end in ends[:-1]):  # blocks do not meet
                cuts = pairwise((0, *ends))
                biases = [None if bias is None else aten.slice.Tensor(proxy(bias), 0, *cut) for cut in cuts]
                each = zip(stored, scales, biases, strict=True)
                y = aten.cat.default([scaled_linear(q, s, w, scale, dtype, b) for w, scale, b in each], -1)
            else:
                y = scaled_linear(q, s, joined(stored), joined(scales), dtype, proxy(bias))
        y = aten.unsqueeze.default(y, 0) if batched else y
    replace(node, y.node)


def _joined_input_scale(graph: Graph, parts: list[Node]) -> Node | None:
    """Return the one scale, (1,) float32, of the input of joined layers: the largest, with which no value saturates."""
    held = [s for s in map(_input_scale, parts) if s is not None]
    if not held:
        return None
    # Ahead of every call: the op that makes the input may come to quantize it.
    first = next(n for n in graph.nodes if n.op == "call_function" and not is_weight(n))
    with inserting(graph, first, like=parts[0]) as proxy:
        scales = [aten.to.dtype(proxy(s), torch.float32) for s in held]
        one = aten.amax.default(aten.cat.default(scales, 0), [0], True) if len(scales) > 1 else scales[0]
    return one.node


QUANTIZE_LINEAR = Pass(
    name="quantize_linear",
    lossy=True,  # inputs are quantized too
    rewrite=quantize_linears,  # after the joins: three linears are one by then, or two
    expect=lambda _, module: _promised(module),
)
