"""Bring a captured graph to one spelling, so that each pattern needs to be written once.

before: _assert_tensor_metadata(x); y = to(x, same dtype); a, b = chunk(y, 2, -1); c = view(a, [...]); d = pow(c, 2)
after:  a = slice(x, 1, 0, 32); b = slice(x, 1, 32, 64); c = reshape(a, [...]); d = pow(c, 2)
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Graph, GraphModule, Node

from seamwise.kernels.signature import known_equal

from .functionalize import functionalize
from .graph import aten, given, infer, is_op, shares_memory, sweep, value, written

_NOTHING = (aten._assert_tensor_metadata.default,)
_CONVERSIONS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default)
_SAME_MEMORY = (aten.alias.default, aten.detach.default, aten.detach_.default, aten.slice.Tensor, aten.expand.default)
_RESHAPE = aten.reshape.default
_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints)
_SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)


def canonicalize(module: GraphModule) -> int:
    """Rewrite `module` in place to the canonical spelling; return how many nodes changed.

    What the graph returns stays a tensor of its own where torch promises one.
    """
    graph, changed = module.graph, functionalize(module)
    # First what gives its argument itself: without it, it shows which views are returned, and who reads a copy.
    for rule in (_itself, _simplify, _argument_of_copy):
        for node in list(graph.nodes):
            if node.op != "call_function":
                continue
            node.meta.setdefault("val", None)  # an assertion returns nothing
            if node.target in _NOTHING:
                graph.erase_node(node)
                changed += 1
            elif (replacement := rule(graph, node)) is not None:
                node.replace_all_uses_with(replacement)
                graph.erase_node(node)
                changed += 1
    sweep(module)
    return changed


def _itself(graph: Graph, node: Node) -> Node | None:
    """Return the argument that a node gives as it is, or None."""
    nothing_to_do = is_op(node, *_CONVERSIONS, aten.contiguous.default) and not _copies(node)
    return node.args[0] if nothing_to_do and _looks_alike(node, node.args[0]) else None  # type: ignore[return-value]


def _simplify(graph: Graph, node: Node) -> Node | None:
    """Return the node to use instead of `node`, or None to keep it (possibly with normalized arguments)."""
    target = node.target
    if _views_all(node):
        return node.args[0]  # type: ignore[return-value]
    if is_op(node, operator.getitem) and is_op(node.args[0], *_SPLITS):
        return _slice_of_split(graph, node)
    if target in _CONVERSIONS:
        return _conversion(graph, node)
    if target in _RESHAPES and (shape := _shape(node)) is not None and (target, *node.args[1:]) != (_RESHAPE, shape):
        return _new(graph, node, _RESHAPE, (node.args[0], shape))
    if target == aten.square.default:
        return _new(graph, node, aten.pow.Tensor_Scalar, (node.args[0], 2))
    if target == aten.slice.Tensor:
        _normalize_slice(node)
    elif target in (aten.transpose.int, aten.unsqueeze.default, aten.cat.default, aten.mean.dim, aten.select.int):
        _normalize_dims(node)
    return None


def _views_all(node: Node) -> bool:
    """Return whether a node is a view of all of its argument, as it is. One that the graph returns is a tensor of its
    own, and so is a parameter without its gradient."""
    if not is_op(node, *_SAME_MEMORY, *_RESHAPES) or any(user.op == "output" for user in node.users):
        return False
    without_gradient = is_op(node, aten.detach.default) and _root(node).meta.get("requires_grad")
    return not without_gradient and _looks_alike(node, node.args[0])


def _argument_of_copy(graph: Graph, node: Node) -> Node | None:
    """Return what a copy copies, where nobody can tell the two apart: the copy is neither returned nor written."""
    if is_op(node, aten.cat.default):
        source: Any = _only_part(node)
    elif is_op(node, *_CONVERSIONS, aten.lift_fresh_copy.default, aten.dropout.default) and _copies(node):
        source = node.args[0]
    else:
        return None
    if source is None or not _looks_alike(node, source, strides=not is_op(node, aten.cat.default)):
        return None
    told_apart = any(user.op == "output" for user in _readers(node)) or _is_written(node) or _is_written(source)
    return None if told_apart else source


def _is_written(node: Node) -> bool:
    """Return whether an op writes into a node's memory."""
    readers = _readers(node)
    memory = {node, *(user for user in readers if shares_memory(user))}
    return any(not memory.isdisjoint(written(user)) for user in readers)


def _readers(node: Node) -> set[Node]:
    """Return what reads a node's memory: its users, and theirs where a user's result may lie in that memory."""
    found, pending = set[Node](), [node]
    while pending:
        for user in pending.pop().users:
            if user not in found:
                found.add(user)
                pending += [user] if shares_memory(user) else []
    return found


def _root(node: Node) -> Node:
    """Return the node in whose memory a view lies."""
    while node.op == "call_function" and shares_memory(node):
        node = node.all_input_nodes[0]
    return node


def _copies(node: Node) -> bool:
    """Return whether an op gives new memory even where there is nothing to do. Of dropout that depends on torch."""
    if is_op(node, aten.dropout.default):
        return not given(node).train
    always = is_op(node, aten._to_copy.default, aten.lift_fresh_copy.default)
    return always or bool(getattr(given(node), "copy", False))


def _looks_alike(node: Node, source: Any, *, strides: bool = True) -> bool:
    """Return whether two nodes' values have the same shape, dtype, device, layout and strides.

    strides  False: which only what is returned shows, for reshapes take any
    """
    a, b = value(source), value(node)
    same = (a.dtype, a.device, a.layout, a.dim()) == (b.dtype, b.device, b.layout, b.dim())
    if not same or not all(map(known_equal, a.shape, b.shape)):
        return False
    return not strides or all(map(known_equal, a.stride(), b.stride()))


def _conversion(graph: Graph, node: Node) -> Node | None:
    """Return `to(x, dtype)` for a conversion of the dtype and of nothing else (device, memory format), or None."""
    source, dtype = node.args[0], value(node).dtype
    if value(source).dtype == dtype or (is_op(node, aten.to.dtype) and node.args[1:] == (dtype,) and not node.kwargs):  # type: ignore[arg-type]
        return None
    plain = _new(graph, node, aten.to.dtype, (source, dtype))
    if _looks_alike(node, plain):
        return plain
    graph.erase_node(plain)
    return None


def _only_part(node: Node) -> Node | None:
    """Return the one part of a cat whose other parts are empty (Phi-3's unrotated columns, where all are rotated)."""
    dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    given: Any = node.args[0]  # not all_input_nodes, which names a part given twice once
    # cat allows a part of shape (0,) beside parts of any rank.
    parts = [p for p in given if not known_equal(value(p).shape[dim if value(p).dim() > 1 else 0], 0)]
    return parts[0] if len(parts) == 1 else None


def _new(graph: Graph, node: Node, target: Any, args: tuple[Any, ...]) -> Node:
    with graph.inserting_before(node):
        new = graph.call_function(target, args)
    new.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
    infer(new)
    return new


def _slice_of_split(graph: Graph, node: Node) -> Node | None:
    """Return the slice that is a part of a split, or None where its size is dynamic: a slice wants numbers."""
    split, index = node.args
    assert isinstance(split, Node) and isinstance(index, int)
    rank = value(node).dim()
    dim = int(split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)) % rank - rank  # type: ignore[arg-type]
    sizes = [part.shape[dim] for part in value(split)[: index + 1]]
    if not all(isinstance(n, int) for n in sizes):
        return None
    return _new(graph, node, aten.slice.Tensor, (split.args[0], dim, sum(sizes[:-1]), sum(sizes)))


def _shape(node: Node) -> list[int] | None:
    """Return a reshape's sizes with -1 for the dynamic one; None when several are, or a size of 0 leaves it open."""
    sizes = list(value(node).shape)
    dynamic = [i for i, s in enumerate(sizes) if not isinstance(s, int)]
    empty = any(isinstance(s, int) and s == 0 for s in sizes)
    if len(dynamic) > 1 or (dynamic and empty):
        return None
    return [-1 if i in dynamic else s for i, s in enumerate(sizes)]


def _normalize_slice(node: Node) -> None:
    arguments: list[Any] = [*node.args, *(0, 0, None)[len(node.args) - 1 :]]
    x, dim, start, end, *step = arguments
    assert isinstance(x, Node) and isinstance(dim, int)
    size, rank = value(x).shape[dim], value(x).dim()
    if isinstance(start, int) and start < 0 and isinstance(size, int):
        start = max(start + size, 0)
    if isinstance(size, int) and (end is None or isinstance(end, int)):
        end = size if end is None else min(max(end + size, 0) if end < 0 else end, size)
    node.args = (x, dim % rank - rank, start or 0, end, *[s for s in step if s not in (1, None)])


def _normalize_dims(node: Node) -> None:
    """Count dimensions from the last (-1), so that a pattern does not depend on leading batch dimensions."""
    source = node.args[0][0] if isinstance(node.args[0], (list, tuple)) else node.args[0]
    rank = value(node if node.target == aten.unsqueeze.default else source).dim()  # type: ignore[arg-type]

    def from_last(argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return [from_last(a) for a in argument]
        return argument % rank - rank if isinstance(argument, int) else argument

    if node.target == aten.cat.default and len(node.args) == 1:
        node.args = (node.args[0], 0)
    count = 3 if node.target == aten.transpose.int else 2
    node.args = (node.args[0], *map(from_last, node.args[1:count]), *node.args[count:])
