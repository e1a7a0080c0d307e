"""Arguments that a contract must not take, or only its meaning may, made from right ones by its signature."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Contract

Arguments = tuple[Any, ...]


def of_tensors(contract: Contract, args: Arguments) -> Iterator[tuple[int, Tensor]]:
    """Yield the position and value of every tensor that a call gives."""
    for at, name in enumerate(a.name for a in contract.op._schema.arguments):
        if at < len(args) and name in contract.signature.tensors and args[at] is not None:
            yield at, args[at]


def other_shapes(contract: Contract, args: Arguments) -> Iterator[tuple[str, Arguments]]:
    """Yield calls in which one tensor has a size, one more or of one, that something else says otherwise, or a rank."""
    names = [a.name for a in contract.op._schema.arguments]
    given = [contract.signature.tensors[names[at]] for at, _ in of_tensors(contract, args)]
    used = Counter(w.lstrip("*") for p in given if len(p.shapes) == 1 for w in p.shapes[0])
    for (at, x), p in zip(of_tensors(contract, args), given, strict=True):
        leads = p.shapes[0][0][0] == "*"
        if not leads:
            yield f"{p.label} with one dimension more", (*args[:at], x[None], *args[at + 1 :])
        for dim in range(x.dim()):
            word = p.shapes[0][dim - x.dim()] if dim - x.dim() >= -len(p.shapes[0]) else p.shapes[0][0]
            if len(p.shapes) > 1 or (word.lstrip("*").isalpha() and used[word.lstrip("*")] == 1) or "|" in word:
                continue
            for size in {x.shape[dim] + 1, 1} - {x.shape[dim]}:
                if size == 1 and word[0] == "*" and x.dim() == 1:
                    continue
                changed = x.new_zeros([*x.shape[:dim], size, *x.shape[dim + 1 :]])
                yield f"{p.label} with {size} of {x.shape[dim]} {word}", (*args[:at], changed, *args[at + 1 :])


def strided(x: Tensor) -> Tensor:
    """Return x as a view of every second element of memory whose others are NaN, or the largest integer."""
    poison = torch.tensor(torch.nan if x.dtype.is_floating_point else torch.iinfo(x.dtype).max)
    wide = torch.empty(*x.shape, 2, dtype=x.dtype, device=x.device).copy_(poison)
    view = wide[..., 0]
    return view.copy_(x)


def strided_calls(contract: Contract, args: Arguments) -> Iterator[tuple[str, Arguments]]:
    """Yield calls in which one tensor that is not written is strided in its last dimension."""
    names = [a.name for a in contract.op._schema.arguments]
    for at, x in of_tensors(contract, args):
        if x.dim() and x.shape[-1] > 1 and names[at] not in contract.mutates:
            yield names[at], (*args[:at], strided(x), *args[at + 1 :])
