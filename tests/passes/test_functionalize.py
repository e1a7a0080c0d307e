"""Writes become results, and the graph computes what it did; a write that other memory could see stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from seamwise.passes.functionalize import functionalize
from seamwise.passes.graph import writes


def normalize(x: Tensor) -> Tensor:
    values, indices = (x * 2).topk(2, -1)
    values /= values.sum(-1, keepdim=True)
    return values + indices


def mask(x: Tensor) -> Tensor:
    chosen = torch.zeros_like(x)
    chosen.scatter_(-1, x.topk(2, -1).indices, 1)
    return chosen.masked_fill(chosen > 0, 3.0)


def join(x: Tensor) -> Tensor:
    both = x.new_empty(x.shape[0], 2 * x.shape[1])
    both[..., : x.shape[1]].copy_(x)
    both[..., x.shape[1] :].copy_(-x)
    return both * both


def twice(x: Tensor) -> Tensor:
    y = x + 1
    return y.mul_(2).add_(y)


def narrow(x: Tensor) -> Tensor:
    """What is written keeps its dtype."""
    return (x + 1).bfloat16().mul_(x)


def seen_through_what_gives_itself(x: Tensor) -> Tensor:
    y = x.type_as(x)
    y.mul_(2)
    return y + x


def seen_through_a_view(x: Tensor) -> Tensor:
    y = x + 1
    view = y.view(-1)
    y.mul_(2)
    return view + 1


def seen_through_a_part(x: Tensor) -> Tensor:
    y = x + 1
    first, second = y.chunk(2, -1)
    first.mul_(2)
    return y + torch.cat((second, second), -1)


def an_input(x: Tensor) -> Tensor:
    return x.mul_(2) + 1


@pytest.mark.parametrize("function", [normalize, mask, join, twice, narrow])
def test_it_computes_the_same_without_writing(function: Callable[[Tensor], Tensor]) -> None:
    module = make_fx(function, tracing_mode="fake")(torch.randn(3, 4))
    wrote = sum(writes(n) for n in module.graph.nodes if n.op == "call_function")
    assert functionalize(module) == wrote > 0
    assert not any(writes(n) for n in module.graph.nodes if n.op == "call_function")
    module.recompile()
    x = torch.randn(3, 4)
    assert torch.equal(module(x.clone()), function(x.clone()))
    assert functionalize(module) == 0


@pytest.mark.parametrize(
    "function", [seen_through_a_view, seen_through_a_part, seen_through_what_gives_itself, an_input]
)
def test_what_other_memory_could_see_stays(function: Callable[[Tensor], Tensor]) -> None:
    module = make_fx(function, tracing_mode="fake")(torch.randn(3, 4))
    assert functionalize(module) == 0
    assert any(writes(n) for n in module.graph.nodes if n.op == "call_function")
