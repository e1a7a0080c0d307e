"""Name LayerNorm over the last dimension.

before: y = aten.layer_norm(x, [D], weight, bias, eps)
after:  y = layer_norm(x, weight, bias, eps)
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from seamwise.kernels import layer_norm
from seamwise.passes.graph import aten, inserting, place, replace, value
from seamwise.passes.matcher import Miss
from seamwise.passes.rewrite import Pass, Report


def raise_layer_norm(module: GraphModule, report: Report) -> None:
    """Rewrite every layer norm of one dimension; another is a miss."""
    for node in list(module.graph.find_nodes(op="call_function", target=aten.layer_norm.default)):
        x, shape, weight, bias, eps = (*node.args, *(None, None, 1e-5)[len(node.args) - 2 :])[:5]
        if (reason := _why_not(x, shape, weight)) is not None:
            report.misses.append(Miss(place(node), node.name, reason))
            continue
        with inserting(module.graph, node, like=node) as proxy:
            given = None if bias is None else proxy(bias)
            y = layer_norm(proxy(x), proxy(weight), given, eps)
        replace(node, y.node)
        module.graph.erase_node(node)
        report.matched += 1


def _why_not(x: object, shape: object, weight: object) -> str | None:
    assert isinstance(x, Node) and isinstance(shape, (list, tuple))
    if len(shape) != 1:
        return f"it normalizes {len(shape)} dimensions, wanted the last one"
    if weight is None:
        return "it has no weight"
    return None if value(x).shape[-1] == shape[0] else f"it normalizes {shape[0]} of {value(x).shape[-1]} columns"


RAISE_LAYER_NORM = Pass(name="raise_layer_norm", rewrite=raise_layer_norm, expect=lambda s: s.layer_norms)
