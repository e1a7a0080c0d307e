"""Cut the graph at its seams into pieces, and find which pieces are the same program.

Two pieces are the same when their canonical text is: ops, providers, arguments, and for every input its dtype, rank
and static sizes, dynamic sizes being named by first appearance. Weights are inputs, so identical layers coincide.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from seamwise.kernels.contract import contract_of
from seamwise.passes.graph import value


@dataclass(slots=True, kw_only=True)
class Piece:
    """A maximal region between two seams. `inputs` and `outputs` name values of the whole graph, in call order."""

    module: GraphModule
    inputs: list[str]
    outputs: list[str]
    digest: str


@dataclass(slots=True, kw_only=True)
class Seam:
    """A call that runs eagerly between pieces: the whole graph's own node."""

    node: Node


def is_seam(node: Node) -> bool:
    """Return whether a node must run eagerly between pieces: its contract says so, never its name."""
    record = contract_of(node.target)
    return record is not None and record.seam


def split(module: GraphModule) -> list[Piece | Seam]:
    """Return the pieces and seams in the order they run."""
    nodes = [n for n in module.graph.nodes if n.op not in ("placeholder", "output")]
    steps: list[Piece | Seam] = []
    run: list[Node] = []
    for node in nodes:
        if not is_seam(node):
            run.append(node)
            continue
        if run:
            steps.append(_piece(run))
            run = []
        steps.append(Seam(node=node))
    return [*steps, _piece(run)] if run else steps


def _piece(run: list[Node]) -> Piece:
    inside = set(run)
    graph = Graph()
    copies: dict[Node, Node] = {}
    inputs = list(dict.fromkeys(n for node in run for n in node.all_input_nodes if n not in inside))
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta.update(val=value(node), weight=node.meta.get("weight", False))
    for node in run:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    outputs = [n for n in run if any(user not in inside for user in n.users)]
    graph.output(tuple(copies[n] for n in outputs))
    module = GraphModule(torch.nn.Module(), graph)
    return Piece(
        module=module, inputs=[n.name for n in inputs], outputs=[n.name for n in outputs], digest=digest(module)
    )


def canonical_text(module: GraphModule) -> str:
    """Return the piece as text that is equal for equal programs."""
    numbers: dict[Node, str] = {}
    symbols: dict[str, str] = {}
    lines = []

    def size(s: Any) -> str:
        return str(s) if isinstance(s, int) else symbols.setdefault(str(s), f"s{len(symbols)}")

    def argument(a: Any) -> Any:
        return torch.fx.node.map_arg(a, lambda n: _Text(numbers[n]))

    for i, node in enumerate(module.graph.nodes):
        numbers[node] = f"%{i}"
        if node.op == "placeholder":
            v = value(node)
            kind = f"{v.dtype}[{', '.join(map(size, v.shape))}]" if isinstance(v, Tensor) else type(v).__name__
            lines.append(f"%{i} = input {kind}")
        elif node.op == "output":
            lines.append(f"return {argument(node.args[0])}")
        else:
            provider = node.meta.get("provider", "")
            lines.append(f"%{i} = {node.target} {provider} {argument(node.args)} {argument(dict(node.kwargs))}")
    return "\n".join(lines)


class _Text(str):
    __repr__ = str.__str__


def digest(module: GraphModule) -> str:
    """Return a short hash of the canonical text."""
    return hashlib.sha256(canonical_text(module).encode()).hexdigest()[:16]
