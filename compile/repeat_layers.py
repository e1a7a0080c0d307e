"""Trace one layer of each kind and repeat it in the graph: tracing takes as long as a model's distinct layers.

Before, each layer traced by itself; after, the nodes of the first layer of a kind, copied with the other's weights and
caches. 64 equal layers are traced as two: 2.9 s of capture instead of 52, tiny ones on a shared machine. The graph is
the one that the whole model gives, node for node, which tests hold for every family; where the traced graph does not
have the form that this rests on, CannotRepeat says what it has instead, and the caller traces all layers.
"""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node

from .capture import Captured, DimNames, capture, unify_tied


class CannotRepeat(ValueError):
    """A traced model does not have the form of layers that follow each other."""


def capture_repeated(
    model: nn.Module, arguments: Mapping[str, Any], dims: DimNames, *, path: str, kinds: Sequence[Hashable],
    only: Callable[[Sequence[int]], AbstractContextManager[None]], per_layer: str,
) -> Captured:  # fmt: skip
    """Return what `capture` gives, tracing one layer of each kind, and of the first layer's kind a second one.

    path       of the list of layers, each of which takes what the one before gives
    kinds      one for each layer: equal ones give equal nodes
    only       makes the model one of these layers alone, for as long as the context is entered
    per_layer  the argument that has one entry for each layer

    Raises CannotRepeat where a traced layer gives more than one value, or reads another layer than the one before it.
    """
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    again = [i for i, kind in enumerate(kinds) if i and kind == kinds[0]][:1]
    chosen = firsts + again
    if len(chosen) == len(kinds):
        return capture(model, arguments, dims)
    with only(chosen):
        some = {name: [given[i] for i in chosen] if name == per_layer else given for name, given in arguments.items()}
        named = {name: [given[i] for i in chosen] if name == per_layer else given for name, given in dims.items()}
        traced = capture(model, some, named)
    # Of which traced layer each is a copy. The first reads the embedding, so no other is a copy of it.
    templates = [0, *(chosen.index(again[0]) if k == kinds[0] else firsts.index(kinds.index(k)) for k in kinds[1:])]
    return _repeated(model, traced, path, templates, per_layer)


def _repeated(model: nn.Module, traced: Captured, path: str, templates: Sequence[int], per_layer: str) -> Captured:
    layer_of = {node: _layer(node, path) for node in traced.graph.nodes if node.op == "call_function"}
    count = max(templates) + 1
    carried = _carried(layer_of, count)
    graph, known = Graph(), dict[Node, Node]()
    copies: list[dict[Node, Node]] = [{} for _ in templates]
    weights, inputs = dict[str, str](), list[str]()

    def placeholder(old: Node, template: int, layer: int) -> Node:
        name = re.sub(rf"^({_prefix(old, path, per_layer)}_){template}_", rf"\g<1>{layer}_", old.name)
        made = graph.placeholder(name)
        made.meta, made.type = dict(old.meta), old.type
        copies[layer][old] = made
        return made

    given = {node.name: node for node in traced.graph.find_nodes(op="placeholder")}
    by_target = {target: given[name] for name, target in traced.weights.items()}
    tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for target, _ in tensors:  # in the order in which the whole model has them
        found = re.match(rf"{re.escape(path)}\.(\d+)\.(.*)", target)
        layer = int(found[1]) if found else 0
        old = by_target.get(f"{path}.{templates[layer]}.{found[2]}" if found else target)
        if old is None:
            continue
        if found:
            weights[placeholder(old, templates[layer], layer).name] = target
        else:
            known[old] = graph.node_copy(old)
            weights[known[old].name] = target
    if lost := [target for target, old in by_target.items() if old not in known and not any(old in c for c in copies)]:
        raise CannotRepeat(f"{lost[0]} is no parameter or buffer of the model")
    for name in traced.inputs:
        found = re.fullmatch(rf"{per_layer}_(\d+)_(\d+)", name)
        if found is None:
            known[given[name]] = graph.node_copy(given[name])
            inputs.append(known[given[name]].name)
        elif name == next(n for n in traced.inputs if n.startswith(f"{per_layer}_")):
            for layer, template in enumerate(templates):
                own = [n for n in traced.inputs if n.startswith(f"{per_layer}_{template}_")]
                inputs += [placeholder(given[n], template, layer).name for n in own]

    body = list(layer_of)
    start = next(i for i, node in enumerate(body) if layer_of[node] is not None)
    end = max(i for i, node in enumerate(body) if layer_of[node] is not None) + 1
    for node in body[:start]:
        known[node] = graph.node_copy(node, partial(_read, known))
    for layer, template in enumerate(templates):
        if layer:
            copies[layer][carried[template - 1]] = copies[layer - 1][carried[templates[layer - 1]]]
        layer_known: MutableMapping[Node, Node] = ChainMap(copies[layer], known)
        for node in (n for n in body[start:end] if layer_of[n] == template):
            layer_known[node] = graph.node_copy(node, partial(_read, layer_known))
            layer_known[node].meta["nn_module_stack"] = _moved(node, f"{path}.{template}", f"{path}.{layer}")
    known[carried[count - 1]] = copies[-1][carried[templates[-1]]]
    for node in body[end:]:
        known[node] = graph.node_copy(node, partial(_read, known))
    (output,) = traced.graph.find_nodes(op="output")
    graph.node_copy(output, partial(_read, known))
    module = GraphModule(nn.Module(), graph)
    unify_tied(model, module, weights)
    return Captured(module=module, weights=weights, inputs=tuple(inputs), constants=traced.constants)


def _read(copies: Mapping[Node, Node], node: Node) -> Node:
    return copies[node]


def _layer(node: Node, path: str) -> int | None:
    """Return in which of the layers a node was made, None for before and behind them."""
    for inside, _ in (node.meta.get("nn_module_stack") or {}).values():
        if found := re.match(rf"{re.escape(path)}\.(\d+)(\.|$)", inside):
            return int(found[1])
    return None


def _carried(layer_of: Mapping[Node, int | None], count: int) -> list[Node]:
    """Return what each layer gives the next, or the last what is behind it. Raises CannotRepeat for any other form."""
    order = [layer for layer in layer_of.values() if layer is not None]
    labels = list(layer_of.values())
    inner = labels[labels.index(0) : len(labels) - labels[::-1].index(count - 1)]
    if order != sorted(order) or None in inner or set(order) != set(range(count)):
        raise CannotRepeat("the nodes of its layers do not follow each other layer by layer")
    carried: list[Node] = []
    for layer in range(count):
        behind = layer + 1 if layer + 1 < count else None
        nodes = [n for n, of in layer_of.items() if of == layer]
        leaving = {n: {layer_of.get(user) for user in n.users} - {layer} for n in nodes}
        leaving = {n: where for n, where in leaving.items() if where}
        if len(leaving) != 1 or [*leaving.values()] != [{behind}]:
            raise CannotRepeat(f"its layer {layer} gives {', '.join(n.name for n in leaving)} to others than the next")
        carried += leaving
    return carried


def _prefix(placeholder: Node, path: str, per_layer: str) -> str:
    """Return what stands before a layer's number in the name of one of its placeholders."""
    kind = placeholder.name.partition("_")[0]  # "p" of parameters, "b" of buffers
    return f"{kind}_{path.replace('.', '_')}" if placeholder.meta.get("weight") else per_layer


def _moved(node: Node, old: str, new: str) -> dict[str, tuple[str, Any]]:
    """Return a node's modules as those of another layer."""
    moved = {}
    for key, (inside, kind) in node.meta["nn_module_stack"].items():
        if inside == old or inside.startswith(f"{old}."):
            key, inside = key.replace(old, new, 1), inside.replace(old, new, 1)
        moved[key] = (inside, kind)
    return moved
