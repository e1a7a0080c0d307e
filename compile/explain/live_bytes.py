"""How much memory a step's values take at once, a token and a row of logits, read from the lowered graph."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from seamwise.compile.split import is_seam
from seamwise.passes.graph import VIEWS, value

from .piece_costs import size_at


class _Blocks:
    """Sizes of blocks that are given out again, to what fills half of one, as by Pool in kernels/cpu/tape_memory.py."""

    def __init__(self) -> None:
        self.free: list[int] = []
        self.num_bytes = 0

    def take(self, size: int) -> int:
        fitting = [block for block in self.free if size <= block <= 2 * size]
        if fitting:
            self.free.remove(min(fitting))
            return min(fitting)
        self.num_bytes += size
        return size


def live_bytes(module: GraphModule) -> tuple[int, int]:
    """Return the bytes of memory that a step's values take turns in: of those with a row a token, and with one a row of
    logits.

    A view is alive with what it is a view of, what a piece is given until it ends. Inside a kernel or a package there
    may be more.
    """
    nodes = list(module.graph.nodes)
    at, seams = {node: i for i, node in enumerate(nodes)}, [i for i, node in enumerate(nodes) if is_seam(node)]
    rows = {name: _first_size(module, name) for name in ("token_ids", "logit_rows")}
    base: dict[Node, Node] = {}
    last: dict[Node, int] = {}
    for i, node in enumerate(nodes):
        viewed = node.target in VIEWS or node.target is torch.ops.aten.view.default
        base[node] = base[node.all_input_nodes[0]] if viewed else node
        for used in node.all_input_nodes:
            last[base[used]] = i
    ends: dict[int, list[Node]] = {}
    for node, i in last.items():
        piece = bisect_left(seams, i)
        given = piece > 0 and at[node] <= seams[piece - 1]
        end = i if is_seam(nodes[i]) or not given else [*seams, len(nodes)][piece] - 1
        ends.setdefault(end, []).append(node)
    pools, held = {name: _Blocks() for name in rows}, dict[tuple[str, Node], list[int]]()
    for i, node in enumerate(nodes):
        for name, size in rows.items():
            if base[node] is node and node in last:
                held[name, node] = [pools[name].take(count) for count in _bytes(node, size)]
            for ended in ends.get(i, []):
                pools[name].free += held.get((name, ended), [])
    return pools["token_ids"].num_bytes, pools["logit_rows"].num_bytes


def _first_size(module: GraphModule, name: str) -> Any:
    found = next((n for n in module.graph.find_nodes(op="placeholder") if n.name == name), None)
    size = None if found is None else value(found).shape[0]
    return size.node.expr if isinstance(size, torch.SymInt) else None


def _bytes(node: Node, size: Any) -> list[int]:
    """Return the bytes at one row of each of a call's results that have a row for each of `size`."""
    if node.op != "call_function" or size is None:
        return []
    tensors = [t for t in tree_leaves(value(node)) if isinstance(t, Tensor)]
    dynamic = [t for t in tensors if any(isinstance(n, torch.SymInt) and n.node.expr.has(size) for n in t.shape)]
    return [t.dtype.itemsize * math.prod(size_at(n, 1) for n in t.shape) for t in dynamic]
