"""Routers that are a softmax and its largest become `moe_route`; what only looks like one stays, and says why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from seamwise.kernels import moe_route
from seamwise.passes import RAISE_MOE, Structure, canonicalize
from seamwise.passes.graph import is_op


def normalized(logits: Tensor) -> tuple[Tensor, Tensor]:
    values, indices = torch.topk(logits.float().softmax(-1), 2, dim=-1)
    values /= values.sum(-1, keepdim=True)
    return values.to(logits.dtype), indices.int()


def plain(logits: Tensor) -> tuple[Tensor, Tensor]:
    values, indices = torch.topk(logits.softmax(-1, dtype=torch.float32), 3, dim=-1)
    return values * 2.5, indices


def softmax_of_the_chosen(logits: Tensor) -> tuple[Tensor, Tensor]:
    values, indices = torch.topk(logits, 2, dim=-1)
    return values.softmax(-1), indices


def of_sigmoids(logits: Tensor) -> tuple[Tensor, Tensor]:
    values, indices = torch.topk(logits.sigmoid(), 2, dim=-1)
    return values, indices


def of_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    values, indices = torch.topk(logits.softmax(-1), 2, dim=0)
    return values, indices


def mask_of_values(logits: Tensor) -> Tensor:
    return torch.topk(logits.softmax(-1), 2, dim=-1)[0]


def rewritten(function: Callable[[Tensor], object], dtype: torch.dtype) -> tuple[torch.fx.GraphModule, int, list[str]]:
    module = make_fx(function, tracing_mode="fake", pre_dispatch=True)(torch.randn(5, 8).to(dtype))
    canonicalize(module)
    report = RAISE_MOE.apply(module, Structure())
    module.recompile()
    return module, report.matched, [miss.reason for miss in report.misses]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", [normalized, plain, softmax_of_the_chosen])
def test_a_router_is_named(function: Callable[[Tensor], tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    module, matched, misses = rewritten(function, dtype)
    assert (matched, misses) == (1, [])
    assert sum(is_op(n, moe_route.op) for n in module.graph.nodes) == 1
    assert not any(is_op(n, torch.ops.aten.topk.default) for n in module.graph.nodes)
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    for got, want in zip(module(logits), function(logits), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)
    assert RAISE_MOE.apply(module, Structure()).matched == 0


@pytest.mark.parametrize(
    ("function", "reason"),
    [(of_sigmoids, "wanted a softmax before it or after"), (of_tokens, "dimension 0"), (mask_of_values, "not read")],
)
def test_a_near_miss_says_why(function: Callable[[Tensor], object], reason: str) -> None:
    _, matched, misses = rewritten(function, torch.float32)
    assert matched == 0 and reason in misses[0]
