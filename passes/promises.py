"""What passes count on the graph that they receive, to promise how often they match."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.fx import GraphModule, Node

from seamwise.kernels import grouped_scaled_linear
from seamwise.kernels.contract import Contract

from .graph import given, place


def calls(module: GraphModule, *records: Contract) -> list[Node]:
    """Return the calls of contracts."""
    return [node for record in records for node in module.graph.find_nodes(op="call_function", target=record.op)]


def inner_sums(module: GraphModule, target: Any) -> int:
    """Return how many sums over ranks, of this op, attention and MLPs end in: all but the embedding's."""
    return sum("embed" not in place(n) for n in module.graph.find_nodes(op="call_function", target=target))


def quantized_mlps(module: GraphModule) -> int:
    """Return how many MLPs of experts read quantized rows in both of their layers."""
    of_starts = Counter(given(layer).starts_E for layer in calls(module, grouped_scaled_linear))
    return sum(count == 2 for count in of_starts.values())
