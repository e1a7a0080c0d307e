"""The Triton kernels of mixture-of-experts layers, composed: against transformers, and batch invariant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from moe_layers import LAYERS, Layer, deepseek_v3, gpt_oss, mixtral, qwen3, rows
from torch import Tensor
from torch.testing import assert_close

from seamwise.kernels import grouped_linear, moe_align, moe_route, moe_route_quant, quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(make: Callable[[], Layer]) -> Layer:
    layer = make()
    layer.block.to(DEVICE)
    moved = {
        name: value.to(DEVICE)
        for name in ("gate_up", "down", "gate_up_bias", "down_bias")
        if (value := getattr(layer, name)) is not None
    }
    return replace(layer, route=tuple(a.to(DEVICE) if isinstance(a, Tensor) else a for a in layer.route), **moved)


def triton(op: Any, *args: Any) -> Any:
    return op.run("triton", *args)


@pytest.mark.parametrize(("make", "T"), [(m, T) for m in LAYERS for T in (1, 70 if m in (mixtral, gpt_oss) else 9)])
def test_a_layer_is_that_of_transformers(make: Callable[[], Layer], T: int) -> None:
    """One token, some, and where experts are few so many that tiles are larger."""
    layer, x = on_device(make), rows(T).to(DEVICE)
    assert_close(layer.ours(x, triton), layer.theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_ranks_with_a_part_of_the_experts_add_up(make: Callable[[], Layer]) -> None:
    layer, x = on_device(make), rows(30).to(DEVICE)
    parts = [layer.ours(x, triton, rank=r, ranks=2) for r in range(2)]
    assert_close(parts[0] + parts[1], layer.theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [mixtral, qwen3])
def test_rows_do_not_depend_on_their_neighbours(make: Callable[[], Layer]) -> None:
    """At a size that keeps its kernel: other tokens, their order and their experts change no bit."""
    layer, x = on_device(make), rows(10).to(DEVICE)
    whole = layer.ours(x, triton)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert torch.equal(layer.ours(x[order], triton), whole[order])
    others = torch.cat((x[:3], rows(7, seed=2).to(DEVICE)))
    assert torch.equal(layer.ours(others, triton)[:3], whole[:3])


def test_slots_of_no_expert_are_zero() -> None:
    for T, experts in ((3, 64), (40, 4)):  # vectors and tiles
        chosen = torch.randint(experts, (T, 2), generator=torch.Generator().manual_seed(0)).int().to(DEVICE)
        chosen[1] = -1
        weight = torch.randn(experts, 24, 40, device=DEVICE)
        bias = torch.ones(experts, 24, device=DEVICE)
        out = triton(grouped_linear, rows(T).to(DEVICE), weight, *triton(moe_align, chosen, experts), 2, bias)
        assert bool((out[2:4] == 0).all()) and bool((out.unflatten(0, (T, 2)) != 0).any(-1).sum() == 2 * T - 2)


def test_all_slots_of_one_expert() -> None:
    chosen = torch.full((150, 2), 2, dtype=torch.int32, device=DEVICE)
    order, starts = triton(moe_align, chosen, 3)
    assert order.tolist() == list(range(300)) and starts.tolist() == [0, 0, 0, 300]
    x, weight = rows(150).to(DEVICE), torch.randn(3, 24, 40, device=DEVICE)
    assert_close(triton(grouped_linear, x, weight, order, starts, 2), (x @ weight[2].T).repeat_interleave(2, 0))


def test_a_decode_of_sorted_slots_spans_blocks() -> None:
    """More slots than one block of the sort has."""
    chosen = torch.randint(-1, 5, (3000, 2), generator=torch.Generator().manual_seed(0)).int().to(DEVICE)
    for got, wanted in zip(triton(moe_align, chosen, 5), moe_align.meaning(chosen, 5), strict=True):
        assert torch.equal(got, wanted)


def test_routing_with_quantization_is_both_in_bits() -> None:
    layer, x = on_device(deepseek_v3), rows(9).to(DEVICE)
    logits = layer.logits(x)
    fused = triton(moe_route_quant, x, logits, torch.int8, 16, *layer.route)
    apart = (*triton(moe_route, logits, *layer.route), *triton(quantize, x, torch.int8, 16))
    assert all(torch.equal(a, b) for a, b in zip(fused, apart, strict=True))


def test_a_logit_that_is_not_a_number_shows() -> None:
    logits = torch.zeros(1, 8, device=DEVICE).index_fill(1, torch.tensor([5], device=DEVICE), torch.nan)
    weights, experts = triton(moe_route, logits, 2, "softmax")
    assert experts[0].tolist() == [5, 0] and bool(weights.isnan().all())


def test_other_dtypes_are_refused() -> None:
    x, groups = rows(2).to(DEVICE), moe_align(torch.zeros(2, 1, dtype=torch.int32, device=DEVICE), 1)
    with pytest.raises(ValueError, match=r"one dtype up to 32 bits, got torch.float32 and torch.float16"):
        triton(grouped_linear, x, torch.zeros(1, 8, 40, device=DEVICE).half(), *groups, 1)
    with pytest.raises(ValueError, match=r"experts must be torch.int32, got torch.int64"):
        triton(moe_align, torch.zeros(2, 1, dtype=torch.int64, device=DEVICE), 1)
