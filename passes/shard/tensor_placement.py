"""Where a tensor's values are while ranks share a model's work, and how each op's placement follows from its inputs'.

None     whole, the same on every rank
Cut      each rank has a part along one dimension
PARTIAL  every rank has a summand of it
OWNED    every row is whole on one rank and zero on the others (rows of experts)
ROUTED   rows of all ranks' tokens, of which each rank has those of its own experts
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from seamwise.kernels import gelu_mul, layer_norm, moe_sum, rms_norm, rope, silu_mul
from seamwise.passes.graph import VIEWS, aten, is_op, place, value

PARTIAL, OWNED, ROUTED = "partial", "owned", "routed"
GATED = (silu_mul.op, gelu_mul.op)


@dataclass(frozen=True, slots=True)
class Cut:
    """Dimension `dim`, counted from the last (-1), is cut: of each section (n, parts) of the whole tensor's, in order,
    a rank has one of `parts` equal parts. With fewer parts than ranks, neighbouring ranks have the same."""

    dim: int
    sections: tuple[tuple[int, int], ...]

    def bounds(self, rank: int, size: int) -> list[tuple[int, int]]:
        """Return where a rank's parts begin and end in the whole tensor."""
        found, start = [], 0
        for n, parts in self.sections:
            part, width = rank // (size // parts), n // parts
            found.append((start + part * width, start + (part + 1) * width))
            start += n
        return found

    @property
    def width(self) -> int:
        """Return the rank's own size of the dimension."""
        return sum(n // parts for n, parts in self.sections)


Placement = Cut | str | None
Shape = tuple[Any, ...]


class Unplaceable(ValueError):
    """The plan asks for what an op cannot do with a rank's part of its input."""

    def __init__(self, node: Node, reason: str) -> None:
        super().__init__(f"shard: {node.name} in {place(node) or 'the model'}: {reason}")


def keeps_partial(node: Node, placed: Callable[[Any], Placement]) -> bool:
    """Return whether an op of summands gives summands of its result: views, multiples, sums of summands."""
    inputs = [placed(a) for a in node.args[:2]]
    if is_op(node, moe_sum.op):
        return True
    if is_op(node, aten.add.Tensor, aten.sub.Tensor):
        return inputs == [PARTIAL, PARTIAL]
    if is_op(node, aten.mul.Tensor):
        return inputs in ([PARTIAL, None], [None, PARTIAL])
    return is_op(node, *VIEWS, aten.div.Tensor) and inputs in ([PARTIAL], [PARTIAL, None])


def follow(node: Node, cuts: dict[Node, Cut], shapes: dict[Node, Shape]) -> Cut:
    """Return how the result of an op is cut whose inputs are, and make its arguments those of the rank's part.

    cuts    of the inputs; shapes: those of whole tensors. Raises Unplaceable where the op needs what other ranks have.
    """
    source, cut = next(iter(cuts.items()))
    if is_op(node, aten.reshape.default):
        return _reshape(node, cut, shapes)
    if is_op(node, aten.slice.Tensor):
        return _slice(node, cut, shapes[source])
    if is_op(node, aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.select.int):
        return _moved(node, cut, len(shapes[source]))
    if is_op(node, aten.cat.default):
        return _cat(node, cuts, shapes)
    if is_op(node, *GATED) and cut.dim == -1:
        if len(cut.sections) != 2 or cut.sections[0] != cut.sections[1]:
            raise Unplaceable(node, f"its input is cut as {cut.sections}, wanted gate and up cut alike")
        return Cut(-1, cut.sections[:1])
    if is_op(node, aten.pad.default) and len(node.args[1]) <= 2 * (-cut.dim - 1):  # type: ignore[arg-type]
        return cut
    by_row = is_op(node, rms_norm.op, layer_norm.op, rope.op, *GATED) and cut.dim < -1
    plain = torch.Tag.pointwise in getattr(node.target, "tags", ()) or is_op(node, aten.to.dtype, aten.clone.default)
    if not (by_row or plain) or len({*cuts.values()}) > 1:
        raise Unplaceable(
            node, f"{node.target} needs the whole of {source.name}, of which a rank has parts {cut.sections} of"
            f" dimension {cut.dim}; give the layer before it the style 'colwise_gather_output'"
        )  # fmt: skip
    for other in node.all_input_nodes:
        whole = shapes[other]
        if plain and other not in cuts and len(whole) >= -cut.dim and whole[cut.dim] != 1:
            raise Unplaceable(node, f"{other.name} is whole, {source.name} is cut along dimension {cut.dim}")
    return cut


def _reshape(node: Node, cut: Cut, shapes: dict[Node, Shape]) -> Cut:
    source, sizes = node.args
    assert isinstance(source, Node) and isinstance(sizes, list)
    was, now = shapes[source], shapes[node]
    if cut.dim == -1 and len(now) > len(was) and _product(now) == was[-1]:
        head = now[-1]
        if any(n % (head * parts) for n, parts in cut.sections):
            raise Unplaceable(node, f"a rank's part of {cut.sections} columns is no whole number of heads of {head}")
        new = Cut(-2, tuple((n // head, parts) for n, parts in cut.sections))
    elif cut.dim == -2 and len(now) < len(was) and _product(was) == now[-1]:
        new = Cut(-1, tuple((n * was[-1], parts) for n, parts in cut.sections))
    elif [*map(str, now[cut.dim :])] == [*map(str, was[cut.dim :])]:
        new = cut
    else:
        raise Unplaceable(node, f"reshapes {was} to {now}, cut along dimension {cut.dim}; wanted heads split or joined")
    node.args = (source, [new.width if i == len(sizes) + new.dim else n for i, n in enumerate(sizes)])
    return new


def _product(shape: Shape) -> int | None:
    """Return heads times their width, None where they are no static sizes."""
    return shape[-2] * shape[-1] if isinstance(shape[-2], int) else None


def _slice(node: Node, cut: Cut, whole: Shape) -> Cut:
    source, dim, start, end, *step = node.args
    assert isinstance(dim, int)
    if dim % len(whole) - len(whole) != cut.dim:
        return cut
    at, local, taken, first = 0, 0, [], None
    for n, parts in cut.sections:
        if start <= at and at + n <= end:  # type: ignore[operator]
            first = local if first is None else first
            taken.append((n, parts))
        at, local = at + n, local + n // parts
    if step or first is None or sum(n for n, _ in taken) != end - start:  # type: ignore[operator]
        raise Unplaceable(node, f"takes {start} to {end} of {whole[cut.dim]}, which is cut as {cut.sections}")
    new = Cut(cut.dim, tuple(taken))
    node.args = (source, dim, first, first + new.width)
    return new


def _moved(node: Node, cut: Cut, rank: int) -> Cut:
    """Return where a view that reorders, adds or drops a dimension puts the one that is cut."""
    order = list(range(rank))
    first: Any = node.args[1]
    if is_op(node, aten.transpose.int):
        second: Any = node.args[2]
        a, b = first % rank, second % rank
        order[a], order[b] = order[b], order[a]
    elif is_op(node, aten.permute.default):
        order = [d % rank for d in first]
    elif is_op(node, aten.unsqueeze.default):
        order.insert(first % (rank + 1), -1)
    elif order.pop(first % rank) == rank + cut.dim:
        raise Unplaceable(node, f"takes one index of dimension {cut.dim}, of which a rank has a part")
    return Cut(order.index(rank + cut.dim) - len(order), cut.sections)


def _cat(node: Node, cuts: dict[Node, Cut], shapes: dict[Node, Shape]) -> Cut:
    tensors, dim = node.args
    parts = [cuts.get(t) for t in tensors]  # type: ignore[arg-type, union-attr]
    dims = {p and p.dim for p in parts}
    rank = len(shapes[node])
    joined = int(dim) % rank - rank  # type: ignore[arg-type]
    if None in dims or len(dims) > 1 or (joined not in dims and len({*parts}) > 1):
        raise Unplaceable(node, f"joins tensors that are cut differently: {[p and p.sections for p in parts]}")
    first = parts[0]
    assert first is not None
    return Cut(joined, sum((p.sections for p in parts if p), ())) if joined in dims else first


def sections_of(node: Node, size: int) -> tuple[tuple[int, int], ...]:
    """Return how a linear layer's columns must be cut for `size` ranks: whole heads, and each of joined projections.

    Raises Unplaceable where they do not divide.
    """
    found = []
    for n, unit in _units(node, -1, 1):
        count = n // unit
        shared = unit > 1 and size % count == 0  # fewer KV heads than ranks: some ranks have the same
        if count % size and not shared:
            what = f"{count} heads" if unit > 1 else f"{n} columns"
            raise Unplaceable(node, f"{what} do not divide among {size} ranks; use another tensor_parallel_size")
        found.append((n, count if count % size else size))
    return tuple(found)


def _units(node: Node, dim: int, unit: int) -> list[tuple[int, int]]:
    """Return (columns, columns of a head) of each projection that a linear layer joins, as its users take them."""
    users, size = list(node.users), int(value(node).shape[dim]) * unit
    rank = value(node).dim()
    if any(is_op(u, *GATED) for u in users):
        return [(size // 2, 1)] * 2
    if all(is_op(u, aten.slice.Tensor) and u.args[1] % rank - rank == dim for u in users):
        taken = {u.args[2]: u for u in users}
        ends = [u.args[3] for u in taken.values()]
        if sorted(taken)[1:] == sorted(ends)[:-1] and 0 in taken:  # type: ignore[type-var]
            return [part for start in sorted(taken) for part in _units(taken[start], dim, unit)]  # type: ignore[type-var]
    for user in users:
        if dim == -1 and is_op(user, aten.reshape.default):
            now = value(user).shape
            if len(now) > 1 and isinstance(now[-2], int) and now[-2] * now[-1] == size:
                return _units(user, -2, int(now[-1]))
    return [(size, unit)]


def is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)
