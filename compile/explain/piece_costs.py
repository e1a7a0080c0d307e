"""What each distinct piece moves and computes at least, from the costs that its contracts state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from seamwise.kernels.contract import contract_of
from seamwise.passes.graph import VIEWS, aten, is_op, value

BATCHES = (1, 64, 512)


def piece_costs(module: GraphModule, batches: Sequence[int] = BATCHES) -> list[dict[str, int]]:
    """Return, for steps of that many tokens, the bytes and flops of a piece: of its ops, each alone.

    A contract's cost is its own; another op moves its tensors once, and computes what torch's flop counter knows of it.
    """
    return [_cost_of(module, tokens) for tokens in batches]


def _cost_of(module: GraphModule, tokens: int) -> dict[str, int]:
    num_bytes = flops = 0
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target in VIEWS:
            continue
        args, out = map_arg(node.args, lambda n: _sized(value(n), tokens)), _sized(value(node), tokens)
        if (record := contract_of(node.target)) is not None:
            cost = record.cost(*args, results=out)
            num_bytes, flops = num_bytes + cost.bytes, flops + cost.flops
            continue
        given = [a for a in torch.utils._pytree.tree_leaves((args, out)) if isinstance(a, Tensor)]
        num_bytes += sum(a.nbytes for a in given)
        flops += _flops(node, args, out)
    return {"tokens": tokens, "bytes": num_bytes, "flops": flops}


def _flops(node: Node, args: Any, out: Any) -> int:
    if is_op(node, aten.linear.default):
        return int(2 * out.numel() * args[0].shape[-1])
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return 0
    from torch.utils.flop_counter import flop_registry  # imports Triton

    known = flop_registry.get(getattr(node.target, "overloadpacket", None))
    return int(known(*args, out_val=out)) if known else 0


def _sized(given: Any, tokens: int) -> Any:
    """Return a tensor without memory whose dynamic sizes are the number of tokens; a size as that number."""
    if isinstance(given, torch.SymInt):
        return tokens
    if isinstance(given, (tuple, list)):
        return tuple(_sized(g, tokens) for g in given)
    if not isinstance(given, Tensor):
        return given
    return torch.empty([size_at(n, tokens) for n in given.shape], dtype=given.dtype, device="meta")


def size_at(n: int | torch.SymInt, tokens: int) -> int:
    """Return a size in a step of so many tokens."""
    if not isinstance(n, torch.SymInt):
        return n
    expression = n.node.expr
    return int(expression.xreplace(dict.fromkeys(expression.free_symbols, tokens)))
