"""A rank's part of a weight: rows, columns or experts; where it is stored quantized, of its scales too.

before: dequantize_weight(stored, scale, zero, format, rows, columns, width, dtype)
after:  dequantize_weight(slice(stored), slice(scale), …): the part's own blocks, where no part ends inside one
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import Node

from seamwise.kernels import dequantize_weight
from seamwise.passes.graph import aten, is_op, value

from .tensor_placement import Unplaceable

Add = Callable[..., Node]  # add(target, *args) inserts a call
Bounds = Sequence[tuple[int, int]]


def held_by(weight: Any) -> Any:
    """Return the placeholder of what a checkpoint holds of a weight: of a dequantized one the stored tensor."""
    plain = _dequantized(weight)
    return weight if plain is None else _stacked(plain.args[0])


def part_of(node: Node, weight: Node, dim: int, bounds: Bounds, size: int, add: Add) -> Node:
    """Return these parts of a weight that `node` reads, side by side, filled up with zeros to `size`.

    Raises Unplaceable where a part ends inside a block that shares a scale.
    """
    plain = _dequantized(weight)
    if plain is None:
        return _taken(weight, dim, bounds, size, add)
    stored, scale, zero, format, rows, columns, width, dtype = plain.args
    assert isinstance(rows, int) and isinstance(columns, int)
    packed = 8 if format == "int4" and dim == -1 else 1
    block = {-1: columns, -2: rows, -3: 1}[dim]
    whole, unit = value(weight).shape[dim], math.lcm(block or 1, packed)
    if any(a % unit or (b % unit and b != whole) for a, b in bounds):
        raise Unplaceable(
            node, f"a rank's part of {whole} is {' and '.join(f'{a} to {b}' for a, b in bounds)}, which cuts blocks of"
            f" {unit} that are stored as one; use a tensor_parallel_size whose parts are multiples of {unit}"
        )  # fmt: skip

    def part(tensor: Any, step: int) -> Any:
        if tensor is None or not step:  # a step of 0: one for all
            return tensor
        parts = [(a // step, -(-b // step)) for a, b in bounds]
        new = _taken(_stacked(tensor), dim, parts, -(-size // step), add)
        return add(aten.reshape.default, new, [-1, value(new).shape[-1]]) if value(new).dim() == 3 else new

    held = part(stored, packed)
    _stacked(held).meta.update({k: v for k, v in _stacked(stored).meta.items() if k in _HOW_INPUTS_ARE})
    form = (format, rows, columns, size if dim == -1 else width, dtype)
    new = add(dequantize_weight.op, held, part(scale, block), part(zero, block), *form)
    if weight is plain:
        return new
    shape = [*value(weight).shape]
    shape[dim] = size
    return add(aten.reshape.default, new, shape)


_HOW_INPUTS_ARE = ("quantizes_input", "input_scale")


def _dequantized(weight: Any) -> Node | None:
    """Return the dequantization behind a weight; that of experts is reshaped."""
    inner = weight.args[0] if is_op(weight, aten.reshape.default) else weight
    return inner if is_op(inner, dequantize_weight.op) else None


def _stacked(tensor: Any) -> Any:
    """Return experts' tensor (E, …) behind the (E · …, …) that is dequantized."""
    return tensor.args[0] if is_op(tensor, aten.reshape.default) else tensor


def _taken(tensor: Node, dim: int, bounds: Bounds, size: int, add: Add) -> Node:
    found = [add(aten.slice.Tensor, tensor, dim, a, b) for a, b in bounds]
    new = add(aten.cat.default, found, dim) if len(found) > 1 else found[0]
    missing = size - value(new).shape[dim]
    return add(aten.constant_pad_nd.default, new, [*[0, 0] * (-dim - 1), 0, missing]) if missing else new
