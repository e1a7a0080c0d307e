"""Put adapters (LoRA) behind the linear layers: each row is changed by the adapter of its request, or by none.

before: y = linear(x, w, bias)
after:  y = linear(x, w, bias)
        y = lora_expand(y, lora_shrink(x, a, adapters), b, adapters, scaling, [N])
A layer that was joined of several (q, k and v) has a slice of columns for each, with its own part of the ranks, as
adapters know the layers apart. a, b and scaling hold one adapter a slot and are no parameter's: the runner writes them
(recipe "adapter"). Where the step has no input `token_adapters`, nothing is changed. An adapter of rank 16 adds
16·(K + N) multiplications a row to the K·N of its layer.
Of a layer of which a rank has rows, it has these rows of B; of one of which it has columns, these of A: what it adds
is then a summand, as what the layer gives, and one sum over the ranks stands behind both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from seamwise.kernels import lora_expand, lora_shrink
from seamwise.kernels.signature import known_equal

from .graph import aten, inserting, is_op, value
from .rewrite import Pass, Report, each_call

INPUT = "token_adapters"  # (T,) int32: the slot of each row's adapter, -1: none


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRoom:
    """How many adapters a step may mix, and their greatest rank: what the input's placeholder says in its meta."""

    max_loras: int
    max_rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedLayer:
    """A layer of the model, or what a rank has of it, as a slice of the columns of what is computed.

    module  its path; shape: (N, K) of its whole weight
    width   columns of the slice
    rows, columns  ranges of its weight that are there: the slice's columns, in order, and the inputs
    """

    module: str
    shape: Sequence[int]
    width: int
    rows: Sequence[Sequence[int]]
    columns: Sequence[Sequence[int]]

    def part_of(self, a_RK: Tensor, b_NR: Tensor) -> tuple[Tensor, Tensor]:
        """Return the columns of A and the rows of B that are for what is there."""
        return torch.cat([a_RK[:, i:j] for i, j in self.columns], 1), torch.cat([b_NR[i:j] for i, j in self.rows])


def add_adapters(module: GraphModule, report: Report) -> None:
    """Change every linear layer of the step's tokens; others are misses."""
    found = [n for n in module.graph.find_nodes(op="placeholder") if n.name == INPUT]
    if not found:
        return
    taken: set[str] = set()

    def change(node: Node) -> str | None:
        layers = _layers(node.args[1])
        if (reason := _why_not(node, layers, taken, found[0])) is None:
            taken.update(layer.module for layer in layers)
            _change(module, node, layers, found[0])
        return reason

    each_call(module.graph.find_nodes(op="call_function", target=aten.linear.default), change, report)


def _layers(weight: Any) -> list[AdaptedLayer]:
    """Return the layers that a weight is of; [] where unknown.

    A weight is a parameter, what is computed from one module's (a quantized one), a part of it that a rank has, or
    several of these joined.
    """
    part = weight.meta.get("part")
    if part is None and is_op(weight, aten.cat.default) and weight.args[1:] in ((), (0,)):
        joined = [_layers(one) for one in weight.args[0]]
        return [layer for found in joined for layer in found] if all(joined) else []
    pending, modules = [weight], set()
    while pending:
        node = pending.pop()
        if node.op == "placeholder":
            modules.add(str(node.meta.get("parameter", "")).rpartition(".")[0])
        pending += node.all_input_nodes
    if len(modules) != 1 or "" in modules:
        return []
    width = value(weight).shape[0]
    dim, bounds, shape = part or (-2, [(0, width)], tuple(value(weight).shape))
    rows, columns = (bounds if dim == d else [(0, shape[d])] for d in (-2, -1))
    return [AdaptedLayer(module=modules.pop(), shape=shape, width=width, rows=rows, columns=columns)]


def _why_not(node: Node, layers: list[AdaptedLayer], taken: set[str], adapters: Node) -> str | None:
    if not layers:
        return "its weight is no module's own"
    if again := taken & {layer.module for layer in layers}:
        return f"{min(again)} is read twice"
    x = value(node.args[0])  # type: ignore[arg-type]
    if any(n != 1 for n in x.shape[:-2]) or not known_equal(x.shape[-2], value(adapters).shape[0]):
        return "its rows are not the step's tokens, each of which has an adapter"
    return None


def _change(module: GraphModule, node: Node, layers: list[AdaptedLayer], adapters: Node) -> None:
    room: AdapterRoom = adapters.meta["adapters"]
    x, y = value(node.args[0]), value(node)  # type: ignore[arg-type]
    widths = [layer.width for layer in layers]
    shapes = {
        "a": (room.max_loras, len(layers) * room.max_rank, x.shape[-1]),
        "b": (room.max_loras, room.max_rank, y.shape[-1]),
        "scaling": (room.max_loras, len(layers)),
    }
    held: dict[str, Node] = {}
    with module.graph.inserting_before(next(iter(module.graph.nodes))):
        for role, shape in shapes.items():
            made = held[role] = module.graph.placeholder(f"adapters_{node.name}_{role}")
            dtype = torch.float32 if role == "scaling" else y.dtype
            recipe = {
                "adapter": role, "layers": [asdict(layer) for layer in layers], "shape": list(shape),
                "dtype": str(dtype).removeprefix("torch."),
            }  # fmt: skip
            made.meta.update(val=y.new_empty(shape, dtype=dtype), weight=True, recipe=recipe)
    users = list(node.users)
    with inserting(module.graph, node.next, like=node) as proxy:
        rows, ids = proxy(node.args[0]), proxy(adapters)
        before = proxy(node)
        if len(x.shape) > 2:
            rows, before = (aten.reshape.default(t, [-1, t.node.meta["val"].shape[-1]]) for t in (rows, before))
        low = lora_shrink(rows, proxy(held["a"]), ids)
        changed = lora_expand(before, low, proxy(held["b"]), ids, proxy(held["scaling"]), widths)
        if len(y.shape) > 2:
            changed = aten.reshape.default(changed, [*y.shape[:-2], -1, y.shape[-1]])
    for user in users:
        user.replace_input_with(node, changed.node)


ADD_ADAPTERS = Pass(name="add_adapters", rewrite=add_adapters)
