"""Bring a captured graph to one spelling, so that each pattern needs to be written once.

before: _assert_tensor_metadata(x); y = to(x, same dtype); a, b = chunk(y, 2, -1); c = view(a, [...]); d = pow(c, 2)
after:  a = slice(x, 1, 0, 32); b = slice(x, 1, 32, 64); c = reshape(a, [...]); d = pow(c, 2)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from .functionalize import functionalize
from .graph import aten, infer, is_op, sweep, value

_NOTHING = (aten._assert_tensor_metadata.default, aten._assert_async.msg, aten.sym_constrain_range_for_size.default)
_SAME = (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.detach_.default)
_RESHAPE = aten.reshape.default
_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints)


def canonicalize(module: GraphModule) -> int:
    """Rewrite `module` in place to the canonical spelling; return how many nodes changed."""
    graph, changed = module.graph, functionalize(module)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _NOTHING:
            graph.erase_node(node)
            changed += 1
        elif (replacement := _simplify(graph, node)) is not None:
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
            changed += 1
    sweep(module)
    return changed


def _simplify(graph: Graph, node: Node) -> Node | None:
    """Return the node to use instead of `node`, or None to keep it (possibly with normalized arguments)."""
    target = node.target
    if target in _SAME or _is_noop(node):
        return node.args[0]  # type: ignore[return-value]
    if is_op(node, operator.getitem) and is_op(
        node.args[0], aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default
    ):
        return _slice_of_split(graph, node)
    if target in (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default):
        return _new(graph, node, aten.to.dtype, (node.args[0], value(node).dtype)) if target != aten.to.dtype else None
    if target in _RESHAPES and (shape := _shape(node)) is not None and (target, node.args[1]) != (_RESHAPE, shape):
        return _new(graph, node, _RESHAPE, (node.args[0], shape))
    if target == aten.cat.default and (whole := _only_part(node)) is not None:
        return whole
    if target == aten.square.default:
        return _new(graph, node, aten.pow.Tensor_Scalar, (node.args[0], 2))
    if target == aten.slice.Tensor:
        _normalize_slice(node)
    elif target in (aten.transpose.int, aten.unsqueeze.default, aten.cat.default, aten.mean.dim, aten.select.int):
        _normalize_dims(node)
    return None


def _is_noop(node: Node) -> bool:
    """Return whether a node returns its first argument unchanged: same shape, dtype, device and strides."""
    kinds = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.type_as.default, aten.slice.Tensor,
             aten.expand.default, aten.contiguous.default, aten.dropout.default, *_RESHAPES)  # fmt: skip
    if not is_op(node, *kinds) or (node.target == aten.dropout.default and node.args[2]):
        return False
    source = node.args[0]
    assert isinstance(source, Node)
    a, b = value(source), value(node)
    same = a.dtype == b.dtype and a.device == b.device and a.dim() == b.dim()
    return same and all(_equal(x, y) for x, y in zip((*a.shape, *a.stride()), (*b.shape, *b.stride()), strict=True))


def _equal(a: Any, b: Any) -> bool:
    return bool(torch.fx.experimental.symbolic_shapes.statically_known_true(a == b))


def _only_part(node: Node) -> Node | None:
    """Return the one part of a cat whose other parts are empty (Phi-3's unrotated columns, where all are rotated)."""
    dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    given: Any = node.args[0]  # not all_input_nodes, which names a part given twice once
    # cat allows a part of shape (0,) beside parts of any rank.
    parts = [p for p in given if not _equal(value(p).shape[dim if value(p).dim() > 1 else 0], 0)]
    return parts[0] if len(parts) == 1 else None


def _new(graph: Graph, node: Node, target: Any, args: tuple[Any, ...]) -> Node:
    with graph.inserting_before(node):
        new = graph.call_function(target, args)
    new.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
    infer(new)
    return new


def _slice_of_split(graph: Graph, node: Node) -> Node:
    split, index = node.args
    assert isinstance(split, Node) and isinstance(index, int)
    rank = value(node).dim()
    dim = int(split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)) % rank - rank  # type: ignore[arg-type]
    start = sum(part.shape[dim] for part in value(split)[:index])
    return _new(graph, node, aten.slice.Tensor, (split.args[0], dim, start, start + value(node).shape[dim]))


def _shape(node: Node) -> list[int] | None:
    """Return a reshape's sizes with -1 for the dynamic one; None when several are dynamic."""
    sizes = list(value(node).shape)
    dynamic = [i for i, s in enumerate(sizes) if not isinstance(s, int)]
    return None if len(dynamic) > 1 else [-1 if i in dynamic else s for i, s in enumerate(sizes)]


def _normalize_slice(node: Node) -> None:
    arguments: list[Any] = [*node.args, *(0, 0, None)[len(node.args) - 1 :]]
    x, dim, start, end, *step = arguments
    assert isinstance(x, Node) and isinstance(dim, int)
    size, rank = value(x).shape[dim], value(x).dim()
    if isinstance(start, int) and start < 0 and isinstance(size, int):
        start += size
    if isinstance(size, int) and (end is None or isinstance(end, int)):
        end = size if end is None else min(end + size if end < 0 else end, size)
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
