"""Cut a lowered step into stages that processes compute one behind the other, each with its layers' weights and caches.

A stage ends behind the attention of its last layer, where least is to be sent: between that layer and the next, as a
rule, a row of the residual and of what is added to it, or its norm, a token. What follows from the step's inputs alone
(rope's tables) is computed again rather than sent. Ops are those of the whole step in their order, so are results.
Source: Huang et al. 2019 (GPipe), https://arxiv.org/abs/1811.06965.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from seamwise.passes.graph import is_getitem, value

from .capture import Captured
from .derive import Recipe
from .split import is_seam


def cut_stage(captured: Captured, recipes: dict[str, Recipe], stage: int, stages: int) -> tuple[Captured, list[str]]:
    """Return a stage's step and what it takes from the one before, its last inputs; recipes keep this stage's.

    Its results are what it gives to the next, or those of the step. Raises ValueError for more stages than layers.
    """
    for node in [n for n in captured.graph.nodes if is_getitem(n)]:
        node.args[0].append(node)  # behind what gives it: no tuple is sent
    nodes = [n for n in captured.graph.nodes if n.op == "call_function"]
    starts = [i for i in range(1, len(nodes)) if is_seam(nodes[i - 1]) and not is_seam(nodes[i])]
    if stages > len(starts):
        raise ValueError(f"pipeline_parallel_size={stages}: the model has {len(starts)} layers; use no more stages")
    at = {node: i for i, node in enumerate(nodes)}
    (tokens,) = (value(n).shape[0] for n in captured.graph.find_nodes(op="placeholder") if n.name == "token_ids")

    def crossing(cut: int) -> list[Node]:
        late = [n for n in nodes[:cut] if any(at.get(user, len(nodes)) >= cut for user in n.users)]
        return [n for n in late if not _follows_from_inputs(n)]

    cuts = [0]
    for k in range(1, stages):
        start = starts[len(starts) * k // stages - 1]
        end = next((i for i in range(start, len(nodes)) if is_seam(nodes[i])), len(nodes) - 1)
        cuts.append(min(range(end, start - 1, -1), key=lambda cut: _bytes_a_token(crossing(cut), tokens)))
    cuts.append(len(nodes))
    taken = crossing(cuts[stage]) if stage else []
    (output,) = captured.graph.find_nodes(op="output")
    given = crossing(cuts[stage + 1]) if stage + 1 < stages else list(output.args[0])
    body = nodes[cuts[stage] : cuts[stage + 1]]
    wanted = _closure([*body, *given], stop={*taken})
    inputs = [n for n in captured.graph.find_nodes(op="placeholder") if n in wanted or _always_there(n)]
    graph, known = Graph(), dict[Node, Node]()
    for node in inputs:
        known[node] = graph.node_copy(node)
    for node in taken:
        known[node] = graph.placeholder(node.name)
        known[node].meta["val"] = value(node)
    for node in nodes:
        if node in wanted and node not in known:
            known[node] = graph.node_copy(node, known.__getitem__)
    graph.output(tuple(known[n] for n in given))
    for name in [name for name in recipes if name not in {n.name for n in inputs}]:
        del recipes[name]
    there = {n.name for n in inputs}
    names = (*(name for name in captured.inputs if name in there), *(n.name for n in taken))
    module = GraphModule(torch.nn.Module(), graph)
    return Captured(module=module, weights=captured.weights, inputs=names), [n.name for n in taken]


def carried_of(module: GraphModule, names: Iterable[str]) -> list[dict[str, Any]]:
    """Return name, dtype and shape of values that are sent from a stage to the next; None for the number of tokens."""
    found = {n.name: value(n) for n in module.graph.nodes if isinstance(n.meta.get("val"), Tensor)}
    return [
        {
            "name": name, "dtype": str(found[name].dtype).removeprefix("torch."),
            "shape": [size if isinstance(size, int) else None for size in found[name].shape],
        }
        for name in names
    ]  # fmt: skip


def _bytes_a_token(nodes: Iterable[Node], tokens: torch.SymInt) -> float:
    """Return what sending values takes; infinite where one is no tensor, or has other rows than tokens."""
    size = 0
    for v in map(value, nodes):
        if not isinstance(v, Tensor) or any(
            isinstance(n, torch.SymInt) and n.node.expr != tokens.node.expr for n in v.shape
        ):
            return math.inf
        size += v.dtype.itemsize * math.prod(n for n in v.shape if isinstance(n, int))
    return size


def _always_there(node: Node) -> bool:
    """Return whether every stage takes an input, read or not: those of the step, but no other stage's caches."""
    return not node.meta.get("weight") and not node.name.startswith("kv_caches")


def _closure(nodes: Iterable[Node], stop: set[Node]) -> set[Node]:
    """Return some nodes and all that they are computed from, but for what is beyond those of `stop`."""
    found, pending = set[Node](), list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += [] if node in stop else node.all_input_nodes
    return found - stop


def _follows_from_inputs(node: Node) -> bool:
    """Return whether a value follows from the step's inputs and small weights, so that computing it again is little."""
    behind = _closure([node], set())
    matrices = any(n.op == "placeholder" and n.meta.get("weight") and value(n).dim() > 1 for n in behind)
    return not matrices and not any(is_seam(n) for n in behind)
