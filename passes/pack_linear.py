"""Pack the weights of linear layers where a kernel wants them packed.

before: y = linear(x, w, bias)
after:  y = linear_packed(x, pack_linear(w), N, bias)      pack_linear(w) is a derived tensor: computed at load
Fires where `linear_packed` has a kernel for the layer's device and dtype; elsewhere torch's GEMM reads w as it is.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from seamwise.kernels import linear_packed, pack_linear

from .graph import aten, inserting, is_op, is_weight, place, replace, value
from .matcher import Miss
from .rewrite import Pass, Report


def pack(module: GraphModule, report: Report) -> None:
    """Rewrite every linear layer over a weight for which a packed kernel exists; the others are misses."""
    for node in list(module.graph.nodes):
        if not is_op(node, aten.linear.default):
            continue
        if (reason := _why_not(node)) is not None:
            report.misses.append(Miss(place(node), node.name, reason))
            continue
        x, weight, *bias = node.args
        with inserting(module.graph, node, like=node) as proxy:
            packed = pack_linear(proxy(weight))
            y = linear_packed(proxy(x), packed, value(weight).shape[0], *[proxy(b) for b in bias if b is not None])
        replace(node, y.node)
        module.graph.erase_node(node)
        report.matched += 1


def _why_not(node: Node) -> str | None:
    x, weight, *bias = node.args
    if not is_weight(weight):
        return "its weight is computed in the step"
    w = value(weight)  # type: ignore[arg-type]
    packing = pack_linear.choose([w])
    if packing.name == "torch":
        return f"no kernel packs {w.dtype} on {w.device.type}: " + str(
            next((r for p in pack_linear.providers if (r := p.why_not(w.device.type, [w]))), "none is registered")
        )
    arguments = [value(x), pack_linear.meaning(w), w.shape[0], *[value(b) for b in bias if b is not None]]  # type: ignore[arg-type]
    for provider in linear_packed.providers[:-1]:
        if (reason := provider.why_not(w.device.type, arguments)) is None:
            return None
    return f"no kernel takes its input: {reason}"


PACK_LINEAR = Pass(name="pack_linear", rewrite=pack)
