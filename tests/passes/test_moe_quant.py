"""Experts over quantized rows: routing and activation quantize as promised, near misses say why, padding is skipped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantized_checkpoints import LAYOUTS, save_quantized
from test_fusions import applied, traced
from torch import Tensor

from seamwise.compile.pipeline import PipelineConfig
from seamwise.compile.startup_times import Ledger
from seamwise.kernels import (
    grouped_scaled_linear,
    moe_align,
    moe_route,
    moe_route_quant,
    moe_sum,
    quantize,
    quantize_weight,
    silu_mul,
    silu_mul_quant,
    weight_scale,
)
from seamwise.passes import FUSE_MOE_ROUTE_QUANT, FUSE_MOE_SILU_MUL_QUANT, Structure
from seamwise.runtime.build.compile_model import compile_model
from seamwise.runtime.build.model_config import ModelConfig
from seamwise.runtime.build.runner_config import RunnerConfig

T, D, I, E, K = 5, 16, 12, 4, 2
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
DEEPSEEK = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "q_lora_rank": 128,
    "kv_lora_rank": 128, "qk_rope_head_dim": 16, "qk_nope_head_dim": 48, "v_head_dim": 48, "head_dim": 16,
}  # fmt: skip


def mixture(**odd: Any) -> Callable[..., Tensor]:
    """Experts of rank `rank` of two ranks, or all; `odd` spoils one condition."""

    def experts(x: Tensor, router: Tensor, up: Tensor, up_s: Tensor, down: Tensor, down_s: Tensor) -> Any:
        first = quantize(x, torch.int8)[0] if odd.get("shared") else None
        read = x * 2 if odd.get("scaled") else x
        logits = torch.tanh(F.linear(read, router)) if odd.get("tanh") else F.linear(read, router)
        weights, chosen = moe_route(logits, K, "softmax")
        count = up.shape[0]
        if "rank" in odd:
            chosen = torch.ops.aten.sub.Tensor(chosen, odd["rank"] * count)
        order, starts = moe_align(chosen, count)
        h = grouped_scaled_linear(*quantize(x, torch.int8), up, up_s, order, starts, K, x.dtype)
        active = silu_mul(h)
        y = grouped_scaled_linear(*quantize(active, torch.int8), down, down_s, order, starts, 1, x.dtype)
        y = moe_sum(y, weights)
        extra = active.sum() if odd.get("kept") else 0.0
        return y + extra if first is None else y + first.float().sum()

    return experts


def weights(ranks: int = 1) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    found: list[Tensor] = [torch.randn(T, D), torch.randn(E, D)]
    for shape in ((2 * I, D), (D, I)):
        plain = torch.randn(E // ranks, *shape)
        scales = torch.stack([weight_scale(w, "int8", 1, 0) for w in plain])
        stored = [quantize_weight(w, s, "int8", 1, 0) for w, s in zip(plain, scales, strict=True)]
        found += [torch.stack(stored), scales]
    return tuple(found)


@pytest.mark.parametrize("odd", [{}, {"shared": True}, {"rank": 0}])
def test_routing_quantizes_the_experts_rows(odd: dict[str, Any]) -> None:
    """Shared experts, which are first, quantize the same rows: the router's logits move ahead of them."""
    report, targets = applied(FUSE_MOE_ROUTE_QUANT, mixture(**odd), *weights(2 if "rank" in odd else 1))
    assert report.matched == 1 and not report.misses
    assert moe_route.op not in targets and targets.count(quantize.op) == 1  # of the activation
    assert targets.index(moe_route_quant.op) > targets.index(torch.ops.aten.linear.default)


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ({"scaled": True}, "by logits of a linear layer of mul, which no expert reads"),
        ({"tanh": True}, "by logits of tanh, which no expert reads"),
    ],
)
def test_routing_by_other_rows_is_a_miss(odd: dict[str, Any], reason: str) -> None:
    report, targets = applied(FUSE_MOE_ROUTE_QUANT, mixture(**odd), *weights())
    assert report.matched == 0 and reason in str(report.misses) and moe_route.op in targets


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_the_activation_quantizes_and_skips_slots_of_other_ranks(rank: int | None) -> None:
    odd, args = ({}, weights()) if rank is None else ({"rank": rank}, weights(2))
    report, targets = applied(FUSE_MOE_SILU_MUL_QUANT, mixture(**odd), *args)
    assert report.matched == 1 and not report.misses and silu_mul.op not in targets
    module = traced(mixture(**odd), *args)
    FUSE_MOE_SILU_MUL_QUANT.apply(module, Structure())
    (fused,) = module.graph.find_nodes(op="call_function", target=silu_mul_quant.op)
    rows = fused.args[4]
    assert (rows is None) == (rank is None)
    if rank is not None:
        module.graph.find_nodes(op="output")[0].args = (rows,)
        module.recompile()
        chosen = moe_route(F.linear(args[0], args[1]), K, "softmax")[1].flatten() - rank * (E // 2)
        own = (chosen >= 0) & (chosen < E // 2)
        found = module(*args)
        assert torch.equal(found[own], chosen[own]) and bool((found[~own] < 0).all())
        assert 0 < int(own.sum()) < T * K


def test_an_activation_that_is_read_again_is_a_miss() -> None:
    report, _ = applied(FUSE_MOE_SILU_MUL_QUANT, mixture(kept=True), *weights())
    assert report.matched == 0 and "has an extra user sum" in report.misses[0].reason


@pytest.mark.parametrize("entry", ["own", "transformers"])
@pytest.mark.parametrize("architecture", ["Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM"])
def test_models_fuse_as_promised_and_are_validated(architecture: str, entry: str, tmp_path: Path) -> None:
    sizes = MOE if architecture.startswith("Qwen") else DEEPSEEK
    save_quantized(tmp_path, LAYOUTS["fp8 blocks"], torch.float32, architecture, **sizes)
    config = ModelConfig.from_directory(tmp_path)
    chosen = RunnerConfig.for_model(
        config, dtype="float32", entry=entry, device="cpu", pipeline=PipelineConfig(validate=True, inductor="never")
    )
    reports = {r.name: r for r in compile_model(config, chosen, Ledger())[0].reports}
    sparse = 2 if architecture.startswith("Qwen") else 1
    named = sparse if (architecture, entry) != ("DeepseekV3ForCausalLM", "transformers") else 0  # spells out its router
    for name, count in (("fuse_moe_route_quant", named), ("fuse_moe_silu_mul_quant", sparse)):
        assert reports[name].matched == reports[name].expected == count and not reports[name].misses
        certificate = reports[name].certificate
        assert certificate and certificate["max_error"] < 1e-9
