"""What is begun is awaited: once, before its value is read and so before the step ends; and in which order ranks begin.

Two batches that take turns (`Executable.in_turns`) each run from one beginning to the next, so of n things that a graph
begins, b1 … bn, both batches begin b1, then both b2, and what a batch has begun it awaits behind the other's beginning.
That order is the graph's alone. Where every rank's graph begins the same, which ranks compare when they load, each
collective meets its own on all ranks, and none waits for one that is not begun.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from seamwise.kernels.contract import contract_of
from seamwise.passes.graph import is_op, value

from .verify import BrokenGraph

_WAIT = torch.ops._c10d_functional.wait_tensor.default


def begins(node: Node) -> bool:
    """Return whether a node begins what is waited for later: until then another batch may compute."""
    space, _, name = str(node.target).partition(".")
    return name.startswith("ep_") and "_begin" in name if space == "seamwise_exchange" else (
        space == "_c10d_functional" and not name.startswith("wait_tensor")
    )  # fmt: skip


def check_awaited(module: GraphModule) -> None:
    """Raise BrokenGraph naming a node: begun and not awaited, awaited twice, read before, or awaited and not begun."""
    for node in module.graph.nodes:
        what = ""
        ends = [user for user in node.users if _awaits(user) and user.args[0] is node]
        begun: Any = node.args[0] if _awaits(node) else None
        if begins(node) and len(ends) != 1:
            what = f"is begun and awaited {len(ends)} times, wanted once"
        elif begins(node) and len(node.users) > 1:
            what = f"is read by {next(u for u in node.users if u not in ends).name} before it is awaited"
        elif _awaits(node) and not (isinstance(begun, Node) and begins(begun)):
            what = f"awaits {begun}, which begins nothing"
        elif _awaits(node) and not is_op(node, _WAIT) and node.args[1:] != begun.args[:-1]:
            what = f"awaits {begun.name}, which was begun with other arguments"
        if what:
            raise BrokenGraph(f"after lower: rule broken: what is begun is awaited once: {node.name} {what}")


def order_of(module: GraphModule) -> str:
    """Return a digest of what a step says to other ranks, in order: ops, how they send, sizes and dtypes."""
    said = []
    for node in module.graph.nodes:
        record = contract_of(node.target)
        if begins(node) or (record is not None and "comm" in record.meaning.__module__.split(".")):
            given = [v for n in node.all_input_nodes if isinstance(v := value(n), Tensor)]
            shapes = [(str(v.dtype), [n if isinstance(n, int) else "T" for n in v.shape]) for v in given]
            plain = [a for a in tree_leaves(node.args) if isinstance(a, str)]
            said.append((str(node.target), node.meta.get("provider"), plain, shapes))
    return hashlib.sha256(str(said).encode()).hexdigest()[:16] if said else ""


def _awaits(node: Node) -> bool:
    return is_op(node, _WAIT) or (str(node.target).startswith("seamwise_exchange.") and not begins(node))
