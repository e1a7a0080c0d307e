"""Mixture-of-experts contracts against transformers' layers, and the laws of routing and sorting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import check
from moe_layers import LAYERS, Layer, deepseek_v3, mixtral, qwen3, rows
from torch import Tensor
from torch.testing import assert_close

from seamwise.kernels import (
    grouped_linear,
    grouped_mxfp4_linear,
    grouped_scaled_linear,
    moe_align,
    moe_route,
    moe_route_quant,
    moe_sum,
    quantize_weight,
    silu_mul_quant,
    weight_scale,
)
from seamwise.kernels.contract import Contract
from seamwise.kernels.moe import grouped_linear_torch

BF16 = torch.bfloat16

layers = pytest.mark.parametrize("make", LAYERS)
Make = Callable[[], Layer]


@pytest.mark.parametrize("make", [*LAYERS, lambda: qwen3(normalize=False)])
def test_a_router_is_that_of_transformers(make: Make) -> None:
    layer, x = make(), rows(200)
    logits, wanted, indices = layer.router(x)
    weights, experts = moe_route(logits, *layer.route)
    assert weights.dtype == torch.float32 and experts.dtype == torch.int32
    dense = torch.zeros_like(logits)
    assert_close(dense.scatter(1, experts.long(), weights), dense.scatter(1, indices, wanted))


@layers
@pytest.mark.parametrize("T", [0, 1, 9, 70])
def test_a_layer_is_that_of_transformers(make: Make, T: int) -> None:
    layer, x = make(), rows(T)
    assert_close(layer.ours(x), layer.theirs(x) if T else x, rtol=1e-4, atol=1e-5)


@layers
def test_ranks_with_a_part_of_the_experts_add_up(make: Make) -> None:
    layer, x = make(), rows(30)
    parts = [layer.ours(x, rank=r, ranks=2) for r in range(2)]
    assert_close(parts[0] + parts[1], layer.ours(x), rtol=1e-4, atol=1e-5)
    assert not any(torch.allclose(p, layer.ours(x)) for p in parts)


def test_tokens_of_padding_have_no_expert() -> None:
    layer, x = mixtral(), rows(12)
    experts = moe_route(layer.logits(x), *layer.route)[1]
    padding = torch.arange(12) % 3 == 1
    padded = layer.ours(x.masked_fill(padding[:, None], torch.nan), experts=experts.masked_fill(padding[:, None], -1))
    assert bool((padded[padding].nan_to_num() == 0).all())  # NaN weights times zero rows
    assert_close(padded[~padding], layer.ours(x)[~padding])


def test_all_tokens_to_one_expert() -> None:
    """Every other expert has none."""
    layer, x = mixtral(), rows(300)
    weights, _ = moe_route(layer.logits(x), *layer.route)
    only = torch.full((300, 2), 5, dtype=torch.int32)
    assert_close(layer.ours(x, experts=only), layer.block.experts(x, only.long(), weights), rtol=1e-4, atol=1e-5)


def test_equal_scores_take_the_lower_expert() -> None:
    logits = torch.zeros(2, 12)
    logits[1, 7] = 1.0
    assert moe_route(logits, 3, "softmax")[1].tolist() == [[0, 1, 2], [7, 0, 1]]
    biased = moe_route(logits, 3, "sigmoid", True, 1.0, torch.zeros(12), 3, 2)[1]
    assert biased.tolist() == [[0, 1, 2], [7, 0, 1]]
    wide = torch.randint(3, (1, 512), generator=torch.Generator().manual_seed(0))  # where topk takes others
    wanted = sorted(range(512), key=lambda e: (-int(wide[0, e]), e))[:8]
    assert moe_route(wide.float(), 8, "softmax")[1][0].tolist() == wanted


def test_the_bias_chooses_but_does_not_weigh() -> None:
    logits, bias = torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.tensor([9.0, 0.0, 0.0, 0.0])
    weights, experts = moe_route(logits, 2, "sigmoid", False, 2.0, bias)
    assert experts.tolist() == [[0, 3]]
    assert_close(weights, 2 * logits[:, [0, 3]].sigmoid())


def test_a_logit_that_is_not_a_number_shows() -> None:
    logits = torch.randn(1, 8).index_fill(1, torch.tensor([5]), torch.nan)
    for score in ("softmax", "sigmoid"):
        weights, experts = moe_route(logits, 2, score)
        assert experts[0, 0] == 5 and bool(weights.isnan().all())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"score": "softmax_topk"}, "'softmax_topk' is not 'softmax' or 'sigmoid'"),
        ({"top_k": 9}, "top_k is 9, wanted 1 to 8"),
        ({"num_groups": 3, "top_groups": 1}, "got 1 of 3 groups"),
        ({"num_groups": 4, "top_groups": 1, "top_k": 3}, "wanted 1 to 2"),
        ({"num_groups": 8, "top_groups": 4, "bias_E": torch.zeros(8)}, "have one each"),
        ({"bias_E": torch.zeros(7)}, "bias has 7 elements but logits has 8 columns"),
    ],
)
def test_routes_that_cannot_be_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        moe_route(torch.zeros(2, 8), **{"top_k": 2, "score": "softmax", **change})


@given(
    experts=st.lists(st.integers(-2, 9), max_size=40), count=st.integers(1, 8),
    mapping=st.none() | st.lists(st.integers(-1, 8), min_size=1, max_size=9),
)  # fmt: skip
def test_sorted_slots(experts: list[int], count: int, mapping: list[int] | None) -> None:
    """Every expert owns its slots, in ascending order, and the slots of none stand last."""
    given_map = None if mapping is None else torch.tensor(mapping, dtype=torch.int32)
    order, starts = moe_align(torch.tensor(experts, dtype=torch.int32)[:, None], count, given_map)
    if mapping is not None:
        experts = [mapping[e] if 0 <= e < len(mapping) else -1 for e in experts]
    for e in range(count):
        assert order[starts[e] : starts[e + 1]].tolist() == [s for s, chosen in enumerate(experts) if chosen == e]
    assert order[starts[count] :].tolist() == [s for s, e in enumerate(experts) if not 0 <= e < count]


def test_a_layer_is_captured_for_any_number_of_tokens() -> None:
    """No size of a result depends on values or restricts the number of tokens."""

    class Module(torch.nn.Module):
        def forward(self, x_TD: Tensor) -> Tensor:
            return layer.ours(x_TD)

    layer = mixtral()
    tokens = torch.export.Dim("tokens", min=2, max=8192)
    exported = torch.export.export(Module(), (rows(8),), dynamic_shapes=({0: tokens},), strict=False)
    for T in (2, 33):
        assert torch.equal(exported.module()(rows(T)), layer.ours(rows(T)))


@pytest.mark.parametrize(("format", "rows_", "group"), [("float8_e4m3fn", 128, 128), ("int8", 1, 0)])
def test_a_quantized_layer_is_near_the_whole(format: str, rows_: int, group: int) -> None:
    layer, x, dtype = deepseek_v3(), rows(64), getattr(torch, format)
    weights, experts, q, scale = moe_route_quant(x, layer.logits(x), dtype, group, *layer.route)
    assert torch.equal(weights, moe_route(layer.logits(x), *layer.route)[0])
    groups = moe_align(experts, 16)

    def quantized(weight_ENK: Tensor) -> tuple[Tensor, Tensor]:
        blocks = (rows_, 128 if rows_ == 128 else 0)
        scales = [weight_scale(w, format, *blocks) for w in weight_ENK]
        values = [quantize_weight(w, s, format, *blocks) for w, s in zip(weight_ENK, scales, strict=True)]
        return torch.stack(values), torch.stack(scales)

    gate_up = grouped_scaled_linear(q, scale, *quantized(layer.gate_up), *groups, 3, torch.float32)
    y = grouped_scaled_linear(
        *silu_mul_quant(gate_up, dtype, group), *quantized(layer.down), *groups, 1, torch.float32
    )  # fmt: skip
    error = moe_sum(y, weights, layer.shared(x)) - layer.theirs(x)
    assert 0 < error.norm() < 0.05 * layer.theirs(x).norm()


def test_mxfp4_weights_are_read_as_transformers_reads_them() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (5, 24, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(115, 130, (5, 24, 3), dtype=torch.uint8, generator=generator)
    weight_EKN = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    x, groups = torch.randn(14, 96, generator=generator), moe_align(torch.arange(14, dtype=torch.int32)[:, None] % 5, 5)
    wanted = torch.einsum("sk,skn->sn", x, weight_EKN[torch.arange(14) % 5])
    assert_close(grouped_mxfp4_linear(x, blocks.flatten(-2), scales, *groups, 1), wanted, rtol=1e-5, atol=1e-4)


def test_sizes_that_do_not_fit_are_refused() -> None:
    x, weight = rows(3), torch.zeros(4, 8, 40)
    order, starts = moe_align(torch.zeros(3, 2, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match=r"grouped_linear: order has 6 elements, wanted R·top_k = 3"):
        grouped_linear(x, weight, order, starts, 1)
    with pytest.raises(ValueError, match=r"grouped_linear: starts has 5 elements, wanted E\+1 = 4"):
        grouped_linear(x, weight[:3], order, starts, 2)
    with pytest.raises(ValueError, match=r"w_scale has shape \(4, 1\), wanted w_scale: \(E, N, 1\) or"):
        grouped_scaled_linear(
            x.to(torch.int8), torch.ones(3, 1), weight.to(torch.int8), torch.ones(4, 1), order, starts, 2, torch.float32
        )


@settings(max_examples=30)
@given(
    st.integers(0, 20), st.sampled_from([1, 3]), st.sampled_from([1, 5]), st.sampled_from([8, 40]), st.integers(0, 99)
)
def test_torchs_grouped_product_keeps_the_contract(R: int, top_k: int, E: int, N: int, seed: int) -> None:
    """It serves GPUs alone: on a CPU its few rows are slower, but the same."""
    anywhere = replace(grouped_linear, providers=[replace(p, devices=None) for p in grouped_linear.providers])
    sizes = {"R": R, "top_k": top_k, "E": E, "N": N, "K": 24}
    check(anywhere, "torch_grouped_mm", grouped_linear.make_inputs(sizes, dtype=BF16, device="cpu", seed=seed))


SCALED = {"R": 9, "top_k": 2, "E": 3, "N": 32, "K": 48}


def test_torchs_scaled_grouped_product_is_laid_out_as_torch_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """No CPU multiplies them: what torch checks of its arguments is checked on those without values."""
    monkeypatch.setattr(grouped_linear_torch, "gpu_before", lambda major: major > 9)
    provider = next(p for p in grouped_scaled_linear.providers if p.name == "torch_grouped_mm")
    for scaled in (0, 1):
        args = grouped_scaled_linear.make_inputs({**SCALED, "rows": scaled}, dtype=BF16, device="cpu")
        assert provider.refuses(*args) is None
        out = provider.call(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))
        assert out.shape == (18, 32) and out.dtype == BF16


@pytest.mark.parametrize(
    ("op", "sizes", "dtype", "said"),
    [
        (grouped_linear, {"N": 20}, BF16, "multiples of 8"), (grouped_linear, {"K": 20}, BF16, "multiples of 8"),
        (grouped_linear, {"bias": True}, BF16, "no bias"), (grouped_linear, {}, torch.float32, "must be torch.bf"),
        (grouped_scaled_linear, {"K": 40}, BF16, "multiples of 16"),
        (grouped_scaled_linear, {}, torch.float32, "a bfloat16 result"),
        (grouped_scaled_linear, {"format": "int8"}, BF16, "must be torch.float8_e4m3fn"),
        (grouped_scaled_linear, {"x_group": 128, "K": 256}, BF16, "one scale a row"),
        (grouped_scaled_linear, {"rows": 128, "K": 256}, BF16, "one scale a row"),
    ],
)  # fmt: skip
def test_torch_refuses_groups_that_it_cannot_serve(
    op: Contract, sizes: dict[str, Any], dtype: torch.dtype, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped_linear_torch, "gpu_before", lambda major: major > 9)
    args = op.make_inputs({**SCALED, **sizes}, dtype=dtype, device="cpu")
    assert said in str(next(p for p in op.providers if p.name == "torch_grouped_mm").refuses(*args))
