"""The rules a graph keeps between stages; a violation names the rule, the node and the stage that broke it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from seamwise.kernels.contract import contract_of
from seamwise.kernels.signature import WrongArguments, known_unequal
from seamwise.passes.graph import inferred, place, value, writes


class BrokenGraph(RuntimeError):
    """A stage left a graph that breaks a rule of the IR: a bug of that stage."""


def verify(
    module: GraphModule, after: str, *, lowered: bool = False, piece: bool = False, constants: bool = False
) -> None:
    """Check every node. `lowered`: each contract has its provider. `piece`: no seam may be inside. `constants`: the
    graph may read constant tensors of its module."""
    known = ("placeholder", "call_function", "get_attr") if constants else ("placeholder", "call_function")
    changed = ""
    for node in module.graph.nodes:
        if node.op == "output":
            continue
        for rule, broken in (
            ("every node is a placeholder or a call of an op", node.op not in known),
            ("every node carries its value's shape and dtype", "val" not in node.meta),
            ("only a seam writes its arguments", _writes_outside_seam(node)),
            ("every value is what its op makes of its arguments", bool(changed := _other_value(node))),
            ("after lowering every contract has a provider", lowered and _unlowered(node)),
            ("no seam is inside a piece", piece and _is_seam(node)),
        ):
            if broken:
                where = f" in {place(node)}" if place(node) else ""
                raise BrokenGraph(f"after {after}: rule broken: {rule}: {node.format_node()}{where}{changed}")


def _other_value(node: Node) -> str:
    """Return how a value differs in shape or dtype from what is inferred anew, "" where it does not.

    A node is looked at again only where it, or a value that it reads, is another than last time.
    """
    inputs = [value(n) for n in node.all_input_nodes]
    if node.op != "call_function" or not any(isinstance(v, Tensor) for v in inputs) or _makes_sizes(node.target):
        return ""
    seen = (node.args, node.kwargs, value(node), *inputs)
    last = node.meta.get("verified", ())
    if len(last) == len(seen) and all(a is b for a, b in zip(last, seen, strict=True)):
        return ""
    try:
        made = inferred(node)
    except WrongArguments as wrong:
        return f": {wrong}"
    for was, now in zip(tree_leaves(value(node)), tree_leaves(made), strict=True):
        if isinstance(was, Tensor) and (was.dtype != now.dtype or known_unequal(tuple(was.shape), tuple(now.shape))):
            return f": it says {was.dtype} {tuple(was.shape)}, the op makes {now.dtype} {tuple(now.shape)}"
    node.meta["verified"] = seen
    return ""


def _makes_sizes(target: object) -> bool:
    """Return whether an op's result has a size of its own at every call, which no other inference gives again."""
    tags = getattr(target, "tags", ())
    return torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags


def _is_seam(node: Node) -> bool:
    record = contract_of(node.target)
    return record is not None and record.seam


def _writes_outside_seam(node: Node) -> bool:
    return node.op == "call_function" and writes(node) and not _is_seam(node)


def _unlowered(node: Node) -> bool:
    return contract_of(node.target) is not None and "provider" not in node.meta
