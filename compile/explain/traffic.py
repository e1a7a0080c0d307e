"""What ranks say to each other in a step, from the lowered graph, and between steps: for `seamwise explain`."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from seamwise.compile.lower import begun
from seamwise.kernels import (
    allreduce_rms_norm,
    allreduce_rms_norm_quant,
    ep_combine,
    ep_dispatch,
    ep_dispatch_quant,
    norm_between_linears,
    reduce_scatter_rms_norm,
)
from seamwise.kernels.comm.collectives import group_size
from seamwise.kernels.contract import contract_of
from seamwise.passes.graph import VIEWS, is_getitem, is_op, value
from seamwise.passes.shard.balance_experts import TABLE

if TYPE_CHECKING:
    from seamwise.compile.program import Program

_OPS = torch.ops._c10d_functional
_FUSED = (allreduce_rms_norm.op, allreduce_rms_norm_quant.op, reduce_scatter_rms_norm.op, norm_between_linears.op)
_PLAIN = (_OPS.all_reduce.default, _OPS.all_gather_into_tensor.default, _OPS.reduce_scatter_tensor.default)


def communicates(module: GraphModule) -> bool:
    """Return whether a piece waits for other ranks."""
    return bool(collectives_of(module))


def collectives_of(module: GraphModule) -> list[dict[str, Any]]:
    """Return op, calls a step, bytes that a rank gives for each row at most: of a token, or of a row of logits; and
    where it is begun before it is waited for, the ops that are computed meanwhile."""
    found = Counter(
        (*each, " ".join(_meanwhile(n)))
        for n in module.graph.nodes
        for each in ([(str(n.target).rpartition(".")[0], _row_bytes(n))] if is_op(n, *_FUSED, *_PLAIN) else _sent(n))
    )
    return [
        {"op": op, "calls": calls, "row_bytes": size} | ({"meanwhile": ops.split()} if ops else {})
        for (op, size, ops), calls in found.items()
    ]


def _sent(node: Node) -> list[tuple[str, int]]:
    """Return what an exchange with experts sends of each token: its choices, its row to each of them or to all."""
    record = begun(node.target) or contract_of(node.target)
    if record not in (ep_dispatch, ep_dispatch_quant, ep_combine):
        return []
    given: list[Any] = [*node.args]
    way = given.pop() if begun(node.target) else node.meta.get("provider")
    *tensors, choices, _, group = given
    ranks, wanted = group_size(group), int(value(choices).shape[1])
    rows = tensors[:1] if record is ep_combine else tensors
    row_bytes = sum(int(value(t).shape[1]) * value(t).dtype.itemsize for t in rows)
    if record is ep_combine:
        return [(f"seamwise.{record.name}:{way}", row_bytes * wanted * (1 if way == "all_to_all" else ranks))]
    others = min(wanted, ranks - 1) if way == "all_to_all" else 1
    return [(f"seamwise.{record.name}:{way}", row_bytes * others), (f"seamwise.{record.name}:choices", 4 * wanted)]


def _meanwhile(node: Node) -> list[str]:
    """Return the names of the ops between what is begun and where it is waited for."""
    end = next((u for u in node.users if begun(node.target) or is_op(u, _OPS.wait_tensor.default)), None)
    found, at = [], node.next
    while end is not None and at is not end and at.op == "call_function":
        if at.target not in VIEWS and not is_getitem(at):
            found.append(str(at.target).split(".")[1])
        at = at.next
    return found


def balance_of(program: Program, dtype: torch.dtype) -> dict[str, int]:
    """Return how many layers have experts that move, their experts and places for them; the bytes of an expert, of a
    layer's table, and of a row on its way to an expert and back. dtype: of parameters that have none of their own.
    """
    tables = [recipe for recipe in program.recipes.values() if recipe.get("state") == TABLE]
    experts, width = len(tables[0]["values"]), len(tables[0]["values"][0])
    own = [p for n, p in program.parameters.items() if n.startswith(f"{tables[0]['layer']}.experts.")]
    return {
        "layers": len(tables), "experts": experts, "places": experts + width - 2,
        "expert_bytes": sum(math.prod(p.shape[1:]) * (p.own_dtype or dtype).itemsize for p in own),
        "table_bytes": 4 * experts * width, "row_bytes": tables[0]["row_bytes"],
    }  # fmt: skip


def weight_bytes(module: GraphModule) -> int:
    """Return the bytes of the weights that a step reads on this rank."""
    weights = [value(n) for n in module.graph.find_nodes(op="placeholder") if n.meta.get("weight")]
    return sum(math.prod(w.shape) * w.dtype.itemsize for w in weights)


def kv_bytes(module: GraphModule) -> int:
    """Return the bytes that this rank caches for each token."""
    caches = [value(n) for n in module.graph.find_nodes(op="placeholder") if n.name.startswith("kv_caches")]
    # A block is (heads, tokens, width), or (tokens, width) of latents.
    return sum(math.prod(c.shape[1:]) // c.shape[-2] * c.dtype.itemsize for c in caches)


def local_inputs(module: GraphModule) -> dict[str, tuple[int, int, int]]:
    """Return name -> (dimension, start, end) of each input of which this rank has a part."""
    return {n.name: n.meta["local"] for n in module.graph.find_nodes(op="placeholder") if "local" in n.meta}


def _row_bytes(node: Node) -> int:
    given: Tensor = value(node)[1] if is_op(node, norm_between_linears.op) else value(node.args[0])  # type: ignore[arg-type]
    return int(given.shape[-1]) * given.dtype.itemsize
