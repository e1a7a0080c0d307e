"""What ranks say to each other in a step, read from the lowered graph: counts and bytes, for `seamwise explain`."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from seamwise.kernels import (
    allreduce_rms_norm,
    allreduce_rms_norm_quant,
    norm_between_linears,
    reduce_scatter_rms_norm,
)
from seamwise.passes.graph import is_op, place, value

_OPS = torch.ops._c10d_functional
_FUSED = (allreduce_rms_norm.op, allreduce_rms_norm_quant.op, reduce_scatter_rms_norm.op, norm_between_linears.op)
_PLAIN = (_OPS.all_reduce.default, _OPS.all_gather_into_tensor.default)


def count_all_reduces(module: GraphModule) -> int:
    """Return how many sums over ranks attention and MLPs end in: all but the embedding's."""
    sums = module.graph.find_nodes(op="call_function", target=_OPS.all_reduce.default)
    return sum("embed" not in place(n) for n in sums)


def communicates(module: GraphModule) -> bool:
    """Return whether a piece waits for other ranks."""
    return bool(collectives_of(module))


def collectives_of(module: GraphModule) -> list[dict[str, Any]]:
    """Return op, calls a step, and bytes that a rank gives for each row: of a token, or of a row of logits."""
    found = Counter(
        (str(n.target).rpartition(".")[0], _row_bytes(n)) for n in module.graph.nodes if is_op(n, *_FUSED, *_PLAIN)
    )
    return [{"op": op, "calls": calls, "row_bytes": size} for (op, size), calls in found.items()]


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
