"""Make the linear layers of one module that read one tensor (query, key, value) a single GEMM.

before: q = linear(x, wq); k = linear(x, wk); v = linear(x, wv)
after:  y = linear(x, cat([wq, wk, wv], 0)); q, k, v = column slices of y (views)
Weights that are stored in different forms (q ignored, k and v in float8) are joined form by form.
One pass over x and one kernel launch instead of three; the weight cat is a derived tensor, computed at load.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch.fx import GraphModule, Node

from seamwise.passes.graph import aten, given, inserting, is_op, is_weight, place, replace, value
from seamwise.passes.matcher import Excuse, Miss
from seamwise.passes.quantization.quantize_linear import storage_of
from seamwise.passes.rewrite import Pass, Report


def fuse_qkv(module: GraphModule, report: Report) -> None:
    """Join every group of two or more sibling linears; a sibling that cannot join is a miss."""
    siblings: defaultdict[tuple[Node, str], list[Node]] = defaultdict(list)
    for node in module.graph.nodes:
        # What fuse_gate_up joined stays as it is: it would meet the router of its mixture of experts here.
        if is_op(node, aten.linear.default) and not is_op(given(node).weight, aten.cat.default):
            siblings[given(node).input, place(node).rpartition(".")[0]].append(node)
    for (_, parent), group in siblings.items():
        if len(group) < 2:
            continue
        joined = [part for part in _stored_alike(group) if len(part) > 1]
        if (reason := _why_not(group)) is not None:
            report.misses.append(Miss(parent, group[0].name, reason))
        elif joined:
            for part in joined:
                _join(module, part)
            report.matched += 1
        else:
            why = Excuse("their weights are stored in different forms, each of which keeps its own kernel")
            report.misses.append(Miss(parent, group[0].name, why))


def _stored_alike(group: list[Node]) -> list[list[Node]]:
    """Return the siblings in groups whose weights, joined, can still be read as they are stored."""
    parts: defaultdict[Any, list[Node]] = defaultdict(list)
    for node in group:
        parts[storage_of(given(node).weight)].append(node)
    return list(parts.values())


def _why_not(group: list[Node]) -> str | None:
    for node in group:
        if not all(is_weight(n) for n in node.all_input_nodes[1:]):
            return f"the weight of {node.name} is computed in the step; only weights can be joined ahead of it"
        if (given(node).bias is None) != (given(group[0]).bias is None):
            return f"one of {node.name} and {group[0].name} has a bias: wanted both or none"
    dtypes = {value(n).dtype for n in group}
    return f"results have dtypes {', '.join(map(str, dtypes))}: wanted one" if len(dtypes) > 1 else None


def _join(module: GraphModule, group: list[Node]) -> None:
    first = group[0]
    with inserting(module.graph, first, like=first) as proxy:
        weight = aten.cat.default([proxy(given(n).weight) for n in group], 0)
        biases = [proxy(given(n).bias) for n in group if given(n).bias is not None]
        bias = [aten.cat.default(biases, 0)] if biases else []
        joined = aten.linear.default(proxy(given(first).input), weight, *bias)
        columns, parts = 0, []
        for node in group:
            width = value(node).shape[-1]
            parts.append(aten.slice.Tensor(joined, -1, columns, columns + width))
            columns += width
    for node, part in zip(group, parts, strict=True):
        replace(node, part.node)


FUSE_QKV = Pass(name="fuse_qkv", rewrite=fuse_qkv, expect=lambda s, _: s.attentions + s.latent_attentions)
