"""Give the ops that write their argument a result of their own, where nothing else looks at that memory.

before: x = topk(...)[0]; x.div_(s); use(x)               y = new_empty(...); y[..., :8].copy_(a); use(y)
after:  x = topk(...)[0]; z = div(x, s); use(z)           y = new_empty(...); z = slice_scatter(y, a, ...); use(z)
transformers' routers and expanded latents write so. What other memory could see is left, and `verify` refuses it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from .graph import aten, infer, is_op, shares_memory, value, writes


def functionalize(module: GraphModule) -> int:
    """Rewrite every such op of ATen in place; return how many."""
    changed = 0
    for node in module.graph.find_nodes(op="call_function", target=aten.dropout.default):
        if not node.args[2] and not any(user.op == "output" for user in node.users):  # its argument, in evaluation
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
            changed += 1
    for node in list(module.graph.nodes):
        if node.op == "call_function" and writes(node) and getattr(node.target, "namespace", "") == "aten":
            changed += _rewrite(module.graph, node)
    return changed


def _rewrite(graph: Graph, node: Node) -> bool:
    target, written = node.target, node.args[0]
    assert isinstance(target, torch._ops.OpOverload) and isinstance(written, Node)
    name = target._schema.name.removeprefix("aten::").removesuffix("_")
    functional = getattr(getattr(aten, name), target._overloadname)
    is_slice = is_op(written, aten.slice.Tensor)
    base = written.args[0] if is_slice else written
    assert isinstance(base, Node)
    later = _from(node)
    if base.op != "call_function" or shares_memory(base) or _is_seen(base, written, later):
        return False
    new = _insert(graph, node, functional, node.args, node.kwargs)
    if value(new).dtype != value(written).dtype:  # a write keeps its memory's dtype: bfloat16 *= float32
        new = _insert(graph, node, aten.to.dtype, (new, value(written).dtype), {})
    node.replace_all_uses_with(new)
    _replace_later(written, new, later)
    if is_slice:
        whole = _insert(graph, node, aten.slice_scatter.default, (base, new, *written.args[1:]), {})
        _replace_later(base, whole, later)
    graph.erase_node(node)
    return True


def _is_seen(base: Node, written: Node, later: set[Node]) -> bool:
    """Return whether a view made before the write, other than what is written, is read after it."""
    views = [u for u in base.users if u not in later and shares_memory(u)]
    return any((v is not written and later & {*v.users}) or _is_seen(v, written, later) for v in views)


def _from(node: Node) -> set[Node]:
    later, current = set(), node
    while current.op != "root":
        later.add(current)
        current = current.next
    return later


def _replace_later(old: Node, new: Node, later: set[Node]) -> None:
    for user in list(old.users):
        if user in later:
            user.replace_input_with(old, new)


def _insert(graph: Graph, before: Node, target: Any, args: Any, kwargs: Any) -> Node:
    with graph.inserting_before(before):
        new = graph.call_function(target, args, kwargs)
    new.meta["nn_module_stack"] = before.meta.get("nn_module_stack")
    infer(new)
    return new
