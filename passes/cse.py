"""Compute once what the graph computes twice: equal ops of equal arguments become one node.

before: a = select(cos, 0, 0); b = select(cos, 0, 0)
after:  a, read by all
Ops that write, draw random numbers or return new memory that somebody may write are left alone: in this functional
graph those are the seams and torch's own factories.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from seamwise.kernels.contract import contract_of

from .graph import is_getitem, writes
from .rewrite import Pass, Report


def merge_equal(module: GraphModule, report: Report) -> None:
    """Replace every call by the first equal one."""
    first: dict[Hashable, Node] = {}
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not _pure(node):
            continue
        key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        kept = first.setdefault(key, node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            module.graph.erase_node(node)
            report.matched += 1


def _pure(node: Node) -> bool:
    record = contract_of(node.target)
    if is_getitem(node):
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or writes(node) or (record is not None and record.seam):
        return False
    return torch.Tag.nondeterministic_seeded not in node.target.tags and bool(node.all_input_nodes)


def _frozen(argument: Any) -> Hashable:
    """Return an argument structure as a key; numbers of other types are other arguments (1, 1.0 and True)."""
    if isinstance(argument, (list, tuple)):
        return ("list", *map(_frozen, argument))
    if isinstance(argument, dict):
        return ("dict", *((k, _frozen(v)) for k, v in sorted(argument.items())))
    return (type(argument), argument)


CSE = Pass(name="cse", rewrite=merge_equal)
