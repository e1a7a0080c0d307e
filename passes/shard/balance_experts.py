"""Let ranks move experts, and have several copies of some: choices go through a table, and are counted.

before: rows, e = ep_dispatch(x, experts, P, group); …; back = ep_combine(y, e, experts, P, group)
after:  places = place_experts(experts, slot_mapping, table, rank)
        rows, e = ep_dispatch(x, places, P, group); …; back = ep_combine(y, e, places, P, group)
        and behind all layers, once: count_experts(cat(experts of each), slot_mapping, loads)
`shard` has given each rank its places' experts, in the order of `first_places`, and the tables begin so. Tables and
loads are no parameter's: they are written in place where a recipe says "state". Rows of padding go nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from seamwise.kernels import count_experts, ep_combine, ep_dispatch, grouped_linear, place_experts
from seamwise.kernels.moe.place_experts import table_of
from seamwise.passes.graph import aten, inserting, is_op, value
from seamwise.passes.promises import calls
from seamwise.passes.rewrite import Parallel, Pass, Report

TABLE, LOADS = "expert_table", "expert_loads"


def first_places(num_experts: int, redundant: int) -> list[int]:
    """Return the expert at each place before anything was balanced: all in order, then the first ones again."""
    return [place % num_experts for place in range(num_experts + redundant)]


def balance_experts(parallel: Parallel, weights: Mapping[str, str]) -> Pass:
    """Return the pass; weights: placeholder -> parameter, by which a table knows its layer."""

    def rewrite(module: GraphModule, report: Report) -> None:
        (slots,) = (n for n in module.graph.find_nodes(op="placeholder") if n.name == "slot_mapping")
        found = module.graph.find_nodes(op="call_function", target=ep_dispatch.op)
        chosen: list[Node] = []
        layers: list[str] = []
        for node in found:
            _, experts, places, _ = node.args
            assert isinstance(experts, Node) and isinstance(places, int) and parallel.redundant is not None
            layers.append(_layer_of(node, weights))
            count = places - parallel.redundant
            table = table_of(first_places(count, parallel.redundant), count, 2 + parallel.redundant)
            row = value(node.args[0])
            told = {"layer": layers[-1], "row_bytes": 2 * row.shape[-1] * row.dtype.itemsize}
            held = _state(module, experts, TABLE, f"{TABLE}_{len(chosen)}", table, **told)
            with inserting(module.graph, node, like=node) as proxy:
                placed = place_experts(proxy(experts), proxy(slots), proxy(held), parallel.rank).node
            for user in [u for u in experts.users if is_op(u, ep_dispatch.op, ep_combine.op)]:
                user.replace_input_with(experts, placed)
            chosen.append(experts)
            report.matched += 1
        if chosen:
            loads = _state(module, chosen[0], LOADS, LOADS, [[0] * count for _ in chosen], layers=layers)
            (output,) = module.graph.find_nodes(op="output")
            with inserting(module.graph, output, like=chosen[-1]) as proxy:
                every = aten.cat.default([proxy(node) for node in chosen], 1)
                count_experts(every, proxy(slots), proxy(loads))

    return Pass(name="balance_experts", rewrite=rewrite, expect=lambda _, module: len(calls(module, ep_dispatch)))


def _state(module: GraphModule, like: Node, role: str, name: str, values: list[list[int]], **told: Any) -> Node:
    """Add an input that the runner writes, which begins as these numbers."""
    with module.graph.inserting_before(next(iter(module.graph.nodes))):
        made = module.graph.placeholder(name)
    val = value(like).new_empty((len(values), len(values[0])), dtype=torch.int32)
    made.meta.update(val=val, weight=True, recipe={"state": role, "values": values, "dtype": "int32", **told})
    return made


def _layer_of(node: Node, weights: Mapping[str, str]) -> str:
    """Return the path of the module whose experts' rows a dispatch sends: that of the first weight they meet."""
    pending = [*node.users]
    while not is_op(pending[0], grouped_linear.op):
        pending += pending.pop(0).users
    weight: Any = pending[0].args[1]
    while weight.op != "placeholder":
        weight = weight.all_input_nodes[0]
    return weights[weight.name].rpartition(".experts.")[0]
