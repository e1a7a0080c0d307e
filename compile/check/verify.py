"""The rules a graph keeps between stages; a violation names the rule, the node and the stage that broke it."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from seamwise.kernels.contract import contract_of
from seamwise.passes.graph import place, writes


class BrokenGraph(RuntimeError):
    """A stage left a graph that breaks a rule of the IR: a bug of that stage."""


def verify(
    module: GraphModule, after: str, *, lowered: bool = False, piece: bool = False, constants: bool = False
) -> None:
    """Check every node. `lowered`: each contract has its provider. `piece`: no seam may be inside. `constants`: the
    graph may read constant tensors of its module."""
    known = ("placeholder", "call_function", "get_attr") if constants else ("placeholder", "call_function")
    for node in module.graph.nodes:
        if node.op == "output":
            continue
        for rule, broken in (
            ("every node is a placeholder or a call of an op", node.op not in known),
            ("every node carries its value's shape and dtype", "val" not in node.meta),
            ("only a seam writes its arguments", _writes_outside_seam(node)),
            ("after lowering every contract has a provider", lowered and _unlowered(node)),
            ("no seam is inside a piece", piece and _is_seam(node)),
        ):
            if broken:
                where = f" in {place(node)}" if place(node) else ""
                raise BrokenGraph(f"after {after}: rule broken: {rule}: {node.format_node()}{where}")


def _is_seam(node: Node) -> bool:
    record = contract_of(node.target)
    return record is not None and record.seam


def _writes_outside_seam(node: Node) -> bool:
    return node.op == "call_function" and writes(node) and not _is_seam(node)


def _unlowered(node: Node) -> bool:
    return contract_of(node.target) is not None and "provider" not in node.meta
