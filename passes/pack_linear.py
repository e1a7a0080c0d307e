"""Pack the weights of linear layers where a kernel wants them packed.

before: y = linear(x, w, bias)
after:  y = linear_packed(x, pack_linear(w), N, bias)      pack_linear(w) is a derived tensor: computed at load
before: y = w4a16_linear(x, q, scale, zero, group, bias)
after:  y = linear_int(x, pack_int_panels(q), scale', -zero · scale', group, N, bias)   (an offset stays as it is)
before: y = grouped_linear(x, w, order, starts, K, bias)
after:  y = grouped_linear_packed(x, pack_linear(flatten(w)), N, order, starts, K, bias)
before: x = gather_rows(w, ids); y = linear(x', w)
after:  p = pack_linear(w); x = gather_packed_rows(p, ids, V, D); y = linear_packed(x', p, V) (one weight, held once)
Fires where the packed op has a kernel for the layer's device and dtype; elsewhere the weight is read as it is.
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from seamwise.kernels import (
    gather_packed_rows,
    gather_rows,
    grouped_linear,
    grouped_linear_packed,
    linear_int,
    linear_packed,
    pack_group_values,
    pack_int_panels,
    pack_linear,
    w4a16_linear,
)
from seamwise.kernels.contract import Contract

from .graph import aten, inserting, is_op, is_weight, place, replace, value
from .matcher import Miss
from .rewrite import Pass, Report


def pack(module: GraphModule, report: Report) -> None:
    """Rewrite every linear layer over a weight for which a packed kernel exists; the others are misses."""
    shared: dict[Any, Node] = {}  # weights that are packed already, for an embedding
    for node in list(module.graph.nodes):
        if is_op(node, w4a16_linear.op):
            _pack_int(module, node, report)
        if is_op(node, grouped_linear.op):
            _pack_experts(module, node, report)
        if is_op(node, gather_rows.op) and _is_tied(node):
            table = node.args[0]  # read before the node goes
            shared[table] = _gather_packed(module, node)
        if not is_op(node, aten.linear.default):
            continue
        if (reason := _why_not(node)) is not None:
            report.misses.append(Miss(place(node), node.name, reason))
            continue
        x, weight, *bias = node.args
        with inserting(module.graph, node, like=node) as proxy:
            packed = proxy(shared[weight]) if weight in shared else pack_linear(proxy(weight))
            y = linear_packed(proxy(x), packed, value(weight).shape[0], *[proxy(b) for b in bias if b is not None])
        replace(node, y.node)
        module.graph.erase_node(node)
        report.matched += 1


def _is_tied(node: Node) -> bool:
    """Return whether a table of embeddings is packed for a linear layer anyhow, and read by nothing else."""
    table, index = node.args
    if not (isinstance(table, Node) and isinstance(index, Node) and is_weight(table)):
        return False
    linears = [u for u in table.users if is_op(u, aten.linear.default) and u.args[1] is table and _why_not(u) is None]
    packed = [pack_linear.meaning(value(table)), value(index), *value(table).shape]
    return 0 < len(linears) == len(table.users) - 1 and _unserved(gather_packed_rows, packed) is None


def _gather_packed(module: GraphModule, node: Node) -> Node:
    table: Any = node.args[0]
    index: Any = node.args[1]
    with inserting(module.graph, node, like=node) as proxy:
        packed = pack_linear(proxy(table))
        rows = gather_packed_rows(packed, proxy(index), *value(table).shape)
    replace(node, rows.node)
    module.graph.erase_node(node)
    return packed.node


def _why_not(node: Node) -> str | None:
    x, weight, *bias = node.args
    if not is_weight(weight):
        return "its weight is computed in the step"
    w = value(weight)  # type: ignore[arg-type]
    if reason := _unserved(pack_linear, [w]):
        return f"no kernel packs {w.dtype} on {w.device.type}: {reason}"
    arguments = [value(x), pack_linear.meaning(w), w.shape[0], *[value(b) for b in bias if b is not None]]  # type: ignore[arg-type]
    reason = _unserved(linear_packed, arguments)
    return reason and f"no kernel takes its input: {reason}"


def _int_arguments(
    shape: tuple[int, int], is_point: bool, x: Any, packed: Any, scale: Any, zero: Any, group: int, bias: Any
) -> Any:
    offset = aten.neg.default(aten.mul.Tensor(zero, scale)) if is_point else zero
    offsets = None if offset is None else pack_group_values(offset)
    return x, pack_int_panels(packed, shape[1]), pack_group_values(scale), offsets, group, shape[0], bias


def _pack_int(module: GraphModule, node: Node, report: Report) -> None:
    given: Any = (*node.args, None)[:6]
    known: Any = [value(a) if isinstance(a, Node) else a for a in given]
    shape = (known[1].shape[0], known[0].shape[-1])
    is_point = known[3] is not None and not known[3].is_floating_point()
    if reason := _unserved(linear_int, _int_arguments(shape, is_point, *known)):
        report.misses.append(Miss(place(node), node.name, reason))
        return
    with inserting(module.graph, node, like=node) as proxy:
        proxied: Any = [proxy(a) if isinstance(a, Node) else a for a in given]
        y = linear_int(*_int_arguments(shape, is_point, *proxied))
    replace(node, y.node)
    module.graph.erase_node(node)
    report.matched += 1


def _pack_experts(module: GraphModule, node: Node, report: Report) -> None:
    given: Any = (*node.args, None)[:6]
    x, weight, *rest = given

    def arguments(of: Any) -> Any:
        packed = pack_linear(aten.flatten.using_ints(of(weight), 0, 1))
        return of(x), packed, value(weight).shape[1], *[of(a) if isinstance(a, Node) else a for a in rest]

    reason = "its weights are computed in the step"
    if is_weight(weight):
        try:
            reason = _unserved(grouped_linear_packed, arguments(value)) or ""
        except ValueError as error:  # what the op does not take, as experts of no whole panels
            reason = str(error)
    if reason:
        report.misses.append(Miss(place(node), node.name, reason))
        return
    with inserting(module.graph, node, like=node) as proxy:
        y = grouped_linear_packed(*arguments(proxy))
    replace(node, y.node)
    module.graph.erase_node(node)
    report.matched += 1


def _unserved(record: Contract, arguments: Any) -> str | None:
    """Return why no kernel of an op takes these arguments, or None."""
    if record.choose(arguments).call is not record.meaning:
        return None
    reasons = (record.why_not(p, arguments) for p in record.providers[:-1])
    return next((r for r in reasons if r), "no kernel is registered")


PACK_LINEAR = Pass(name="pack_linear", rewrite=pack)
