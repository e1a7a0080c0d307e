"""Small helpers on FX graphs that every pass and the compiler share: values, places, insertion with shapes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer
from torch.utils._pytree import tree_flatten

from seamwise.kernels.signature import WrongArguments, known_equal

aten = torch.ops.aten

# Ops that only look at their argument's memory another way: free to keep, free to repeat.
VIEWS = {
    aten.reshape.default, aten.slice.Tensor, aten.select.int, aten.transpose.int, aten.unsqueeze.default,
    aten.squeeze.dim, aten.permute.default, aten.expand.default,
}  # fmt: skip


# Composite ops that may give their argument itself, which their schemas do not say.
_GIVE_ARGUMENT = {
    aten.type_as.default, aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default, aten.sum_to_size.default, aten.atleast_1d.default, aten.atleast_2d.default,
    aten.atleast_3d.default, aten.broadcast_tensors.default, aten.meshgrid.default, aten.meshgrid.indexing,
}  # fmt: skip


def value(node: Node) -> Any:
    """Return the fake value of a node (a FakeTensor, a tuple of them, or a SymInt)."""
    return node.meta["val"]


def place(node: Node) -> str:
    """Return the path of the module whose forward produced this node, '' when unknown."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else ""


def fake_values(argument: Any) -> Any:
    """Replace every node inside an argument structure by its fake value."""
    return torch.fx.node.map_arg(argument, value)


@contextmanager
def inserting(graph: Graph, before: Node, like: Node) -> Iterator[Callable[[Any], Any]]:
    """Give a function that wraps a node as a Proxy; ops called on proxies are inserted before `before`.

    What is no node (a number, None) it gives back. A wrapped node that stands after `before` is moved ahead of it. The
    new nodes get their fake values on exit, and the module path of `like`. Raises WrongArguments, and inserts nothing,
    where a contract among them does not take its arguments.
    """
    first = before.prev
    moved: set[Node] = set()
    tracer = GraphAppendingTracer(graph)

    def wrap(node: Any) -> Any:
        if not isinstance(node, Node):
            return node
        lift(node, before if first.next is before else first.next, moved)
        return Proxy(node, tracer)

    with graph.inserting_before(before):
        yield wrap
    last = first
    try:
        while (new := last.next) is not before:
            if new not in moved:
                new.meta.setdefault("nn_module_stack", like.meta.get("nn_module_stack"))
                infer(new)
            last = new
    except WrongArguments:
        made = before.prev
        while made is not first:
            made, node = made.prev, made
            if node not in moved:
                graph.erase_node(node)
        raise


def lift(node: Node, first: Node, moved: set[Node] | None = None) -> None:
    """Move a node that does not read `first`, and what it is computed from, ahead of it where they stand after.

    moved  is given the nodes that were moved
    """
    assert node is not first, f"{first.name} would read what stands before itself"
    if node > first:
        for source in node.all_input_nodes:
            lift(source, first, moved)
        first.prepend(node)
        if moved is not None:
            moved.add(node)


def infer(node: Node) -> None:
    """Give a call_function node the fake value that follows from its arguments."""
    node.meta["val"] = inferred(node)


def inferred(node: Node) -> Any:
    """Return the fake value that a call_function node's op makes of its arguments."""
    assert node.op == "call_function" and callable(node.target), node.format_node()
    args, kwargs = fake_values(node.args), fake_values(node.kwargs)
    # An op takes milliseconds on symbolic sizes, and equal layers ask the same.
    leaves, structure = tree_flatten((args, kwargs))
    mode = next((leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor)), None)
    if mode is None:
        return node.target(*args, **kwargs)
    key = (node.target, structure, *map(_identity, leaves))
    known = _INFERRED.setdefault(mode, {})
    if key not in known:
        with enable_python_dispatcher():  # without it, C++ asks a symbolic tensor for its size (torch 2.11's linear)
            known[key] = node.target(*args, **kwargs)
    return known[key]


_INFERRED: WeakKeyDictionary[FakeTensorMode, dict[Any, Any]] = WeakKeyDictionary()


def _identity(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return *map(_identity, (*leaf.shape, *leaf.stride())), leaf.dtype, leaf.device
    return (leaf.node.expr,) if isinstance(leaf, torch.SymInt) else (type(leaf), leaf)


def replace_by(node: Node, made: Callable[[Callable[[Any], Any]], Proxy]) -> None:
    """Put in a call's place what is made of proxies; `made` is given what wraps a node as one, as by `inserting`."""
    with inserting(node.graph, node, like=node) as proxy:
        new = made(proxy)
    replace(node, new.node)


def replace_results(node: Node, results: Mapping[int, Proxy]) -> None:
    """Let those who read one of a call's results, by its number, read another value."""
    for item in list(node.users):
        assert is_getitem(item), item.format_node()
        if item.args[1] in results:
            replace(item, results[item.args[1]].node)  # type: ignore[index]


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Return whether two shapes are known to be equal, whatever the dynamic sizes are."""
    return known_equal(tuple(a), tuple(b))


def replace(old: Node, new: Node) -> None:
    """Let every user of `old` read `new`, and remove it; views are inferred again, as their strides may differ."""
    old.replace_all_uses_with(new)
    if not old.users:
        old.graph.erase_node(old)
    pending = list(new.users)
    while pending:
        user = pending.pop()
        if user.op == "call_function" and user.target in VIEWS:
            infer(user)
            pending += user.users


def is_op(node: Any, *targets: Any) -> bool:
    """Return whether `node` is a call of one of `targets`."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def is_weight(node: Any) -> bool:
    """Return whether a node depends on weights alone: a weight placeholder, or computed from such."""
    pending, seen = [node], set()
    while pending:
        found = pending.pop()
        if found in seen:
            continue
        seen.add(found)
        if not isinstance(found, Node) or (found.op == "placeholder" and not found.meta.get("weight")):
            return False
        if found.op != "placeholder":
            if found.op != "call_function" or not found.all_input_nodes:
                return False
            # Placeholders first: the next attention names the step's inputs, the residual leads through every layer.
            pending += sorted(found.all_input_nodes, key=lambda n: n.op == "placeholder")
    return True


def given(node: Node) -> Any:
    """Return a call's arguments by the names its op's schema gives them; one that is left out is its default."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    known = {a.name: a.default_value for a in schema}
    return SimpleNamespace(**known | dict(zip(known, node.args, strict=False)) | node.kwargs)


def arguments(node: Node) -> list[Any]:
    """Return all of a call's arguments in order, what is left out as its default."""
    return list(vars(given(node)).values())


def sweep(module: GraphModule) -> None:
    """Remove dead nodes (never a placeholder, a write, an assertion or a random draw) and check the graph."""
    for node in reversed(list(module.graph.nodes)):
        collective = getattr(node.target, "namespace", "") == "_c10d_functional"  # which every rank drops alike
        if node.op == "call_function" and not node.users and (collective or not node.is_impure()):
            module.graph.erase_node(node)
    module.graph.lint()


def writes(node: Node) -> bool:
    """Return whether a node's op writes one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def written(node: Node) -> list[Node]:
    """Return the arguments that a node's op writes."""
    if not writes(node):
        return []
    schema: Any = node.target._schema  # type: ignore[union-attr]
    named = vars(given(node))
    wanted = [named[a.name] for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [leaf for leaf in tree_flatten(wanted)[0] if isinstance(leaf, Node)]


def shares_memory(node: Node) -> bool:
    """Return whether a call's result may lie in an argument's memory, by its op's schema."""
    source: Any = node.args[0] if is_getitem(node) else node
    schema = getattr(source.target, "_schema", None)
    if schema is None:
        return False
    return source.target in _GIVE_ARGUMENT or any(r.alias_info is not None for r in schema.returns)


def is_getitem(node: Any) -> bool:
    return is_op(node, operator.getitem)
