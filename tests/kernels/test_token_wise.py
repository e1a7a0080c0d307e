"""Token-wise ops against others' implementations, and what they refuse; test_contracts.py has the rest."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seamwise.kernels import (
    add_rms_norm,
    add_rms_norm_quant,
    gelu_mul,
    layer_norm,
    lora_expand,
    lora_shrink,
    qk_norm_rope,
    quantize,
    rms_norm,
    rms_norm_quant,
    rope,
    silu_mul,
    silu_mul_quant,
    swiglu_clamped,
)

SCHEMES = [(torch.float8_e4m3fn, 0, None), (torch.int8, 16, None), (torch.float8_e4m3fn, 0, torch.tensor([0.02]))]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_is_torchs(bias: bool) -> None:
    x, weight, b = draw(5, 200) + 2, draw(200, seed=1), draw(200, seed=2) if bias else None
    torch.testing.assert_close(layer_norm(x, weight, b, 1e-3), F.layer_norm(x, (200,), weight, b, 1e-3))


@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "gelu", "silu"])
def test_gated_activations_are_transformers(act: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    mlp = LlamaMLP(LlamaConfig(hidden_size=8, num_attention_heads=2, intermediate_size=24, hidden_act=act))
    x = 3 * draw(7, 8)
    joined = torch.cat((mlp.gate_proj(x), mlp.up_proj(x)), -1)
    ours = silu_mul(joined) if act == "silu" else gelu_mul(joined, "tanh" if act.endswith("tanh") else "none")
    torch.testing.assert_close(mlp.down_proj(ours), mlp(x))


def test_swiglu_clamped_is_gpt_oss() -> None:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    experts = GptOssExperts(GptOssConfig(hidden_size=8, intermediate_size=24, num_local_experts=2))
    x = 6 * draw(9, 48)  # beyond the limit of 7, on both sides
    assert bool((x > 7).any()) and bool((x < -7).any())
    theirs = experts._apply_gate(x)
    torch.testing.assert_close(swiglu_clamped(x, interleaved=True), theirs)
    torch.testing.assert_close(swiglu_clamped(torch.cat((x[:, ::2], x[:, 1::2]), -1)), theirs)


@pytest.mark.parametrize("model", ["Qwen3", "Gemma3"])
def test_qk_norm_rope_is_transformers(model: str) -> None:
    from transformers.models.gemma3 import modeling_gemma3
    from transformers.models.qwen3 import modeling_qwen3

    H, K, D, T = 4, 2, 16, 5
    qkv, angles = draw(T, (H + 2 * K) * D), draw(T, D // 2, seed=1).repeat(1, 2)
    module = modeling_qwen3 if model == "Qwen3" else modeling_gemma3
    norms = [getattr(module, f"{model}RMSNorm")(D, eps=1e-6) for _ in range(2)]
    for i, norm in enumerate(norms):
        norm.weight.data = draw(D, seed=2 + i)
    heads = [part.unflatten(1, (-1, D)) for part in qkv[:, : (H + K) * D].split((H * D, K * D), 1)]
    normed = [norm(part).transpose(0, 1)[None] for norm, part in zip(norms, heads, strict=True)]
    theirs = module.apply_rotary_pos_emb(*normed, angles.cos()[None], angles.sin()[None])
    weights = [norm.weight.data + (model == "Gemma3") for norm in norms]
    ours = qk_norm_rope(qkv, *weights, angles.cos(), angles.sin(), H, K, 1e-6)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other[0].transpose(0, 1))


def test_qk_norm_rope_is_its_ops_composed() -> None:
    H, K, D, T = 3, 1, 32, 6
    qkv, angles = draw(T, (H + 2 * K) * D, dtype=torch.bfloat16), draw(T, 16, seed=1)
    weights = draw(2, D, dtype=torch.bfloat16, seed=2)
    q, k = qk_norm_rope(qkv, weights[0], weights[1], angles.cos(), angles.sin(), H, K, 1e-6)
    heads = qkv.unflatten(1, (-1, D))
    for got, part, weight in ((q, heads[:, :H], weights[0]), (k, heads[:, H : H + K], weights[1])):
        assert torch.equal(got, rope(rms_norm.meaning(part, weight, 1e-6), angles.cos(), angles.sin()))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_is_unfused(scheme: tuple[torch.dtype, int, Tensor | None], dtype: torch.dtype) -> None:
    x, residual, weight = (draw(4, 96, dtype=dtype, seed=s) for s in range(3))
    normed, total = add_rms_norm(x, residual, weight[0], 1e-6)
    pairs = [
        (rms_norm_quant(x, weight[0], 1e-6, *scheme), quantize(rms_norm(x, weight[0], 1e-6), *scheme)),
        (add_rms_norm_quant(x, residual, weight[0], 1e-6, *scheme), (*quantize(normed, *scheme), total)),
        (silu_mul_quant(x, *scheme), quantize(silu_mul(x), *scheme)),
    ]
    for fused, unfused in pairs:
        for a, b in zip(fused, unfused, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_padding_is_zeros_whatever_it_holds() -> None:
    x, row = draw(4, 64), torch.tensor([0, -1, 3, -1], dtype=torch.int32)
    x[row < 0] = torch.nan
    q, scale = silu_mul_quant(x, torch.int8, 16, None, row)
    assert not bool(q[row < 0].any()) and bool(scale.isfinite().all())
    kept, _ = silu_mul_quant(x[row >= 0], torch.int8, 16)
    assert torch.equal(q[row >= 0], kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lora_is_a_loop_over_tokens(dtype: torch.dtype) -> None:
    """Two slices of columns, each with its own part of the ranks; rows without an adapter keep their bits, -0 too."""
    L, T, D, R, widths = 3, 9, 20, 4, [5, 7]
    x, a, b, y = (t.to(dtype) for t in (draw(T, D), draw(L, 2 * R, D, seed=1), draw(L, R, 12, seed=2), draw(T, 12)))
    y[1] = -0.0
    adapter, scaling = torch.tensor([2, -1, 0, 0, 1, -1, 2, 1, 0], dtype=torch.int32), draw(L, 2, seed=5)
    s = lora_shrink(x, a, adapter)
    ours = lora_expand(y, s, b, adapter, scaling, widths)
    for t, l in enumerate(adapter.tolist()):
        low = a[l] @ x[t]
        update = torch.cat([low[:R] @ b[l, :, :5] * scaling[l, 0], low[R:] @ b[l, :, 5:] * scaling[l, 1]])
        torch.testing.assert_close(ours[t], y[t] if l < 0 else y[t] + update.to(dtype))
    bits = {torch.float32: torch.int32, torch.float64: torch.int64}[dtype]
    assert torch.equal(ours[adapter < 0].view(bits), y[adapter < 0].view(bits)) and not bool(s[adapter < 0].any())


@pytest.mark.parametrize("provider", [None, "cpp"])
def test_lora_of_no_row_computes_nothing(provider: str | None) -> None:
    x, a, b, y = draw(3, 8), draw(2, 8, 8, seed=1), draw(2, 4, 12, seed=2), draw(3, 12, seed=3)
    none, scaling = torch.empty(0, dtype=torch.int32), torch.ones(2, 2)
    ops = lora_shrink, lora_expand
    shrink, expand = (op.meaning if provider is None else partial(op.run, provider) for op in ops)
    s = shrink(x, a, none)
    assert s.shape == (0, 8) and torch.equal(expand(y, s, b, none, scaling, [5, 7]), y)


def test_what_an_op_returns_is_the_callers_own_and_may_be_nothing() -> None:
    y, none = draw(3, 12), torch.empty(0, dtype=torch.int32)
    args = y, torch.empty(0, 8), draw(2, 4, 12), none, torch.ones(2, 2), [5, 7]
    result = torch.ops.seamwise.lora_expand(*args)
    assert torch.equal(result, y) and result.data_ptr() != y.data_ptr()
    cache, rows = torch.zeros(2, 3, 1, 4, 16), draw(2, 1, 16)
    assert torch.ops.seamwise.kv_append(rows, rows, *cache, torch.tensor([0, 5]), None, torch.ones(1)) is None
    assert torch.equal(cache[0, 1, 0, 1], rows[1, 0])


def test_an_adapter_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="lora_shrink: row 1 has adapter 2, wanted below 2"):
        lora_shrink(draw(3, 8), draw(2, 4, 8), torch.tensor([0, 2, -1]))
    with pytest.raises(ValueError, match=r"widths \[5, 5\] are 10 columns, b has 12"):
        lora_expand(
            draw(2, 12), draw(2, 8), draw(1, 4, 12), torch.zeros(2, dtype=torch.int32), torch.ones(1, 2), [5, 5]
        )


def test_lora_of_experts_is_one_index() -> None:
    L, E, T, D, R = 2, 3, 8, 16, 4
    x, a = draw(T, D), draw(L, E, R, D, seed=1)
    adapter, expert = torch.tensor([0, 1, -1, 1, 0, 0, -1, 1]), torch.tensor([2, 0, 1, 2, 1, 0, 2, 1])
    index = torch.where(adapter < 0, -1, adapter * E + expert)
    s = lora_shrink(x, a.flatten(0, 1), index)
    for t in range(T):
        wanted = torch.zeros(R) if adapter[t] < 0 else a[adapter[t], expert[t]] @ x[t]
        torch.testing.assert_close(s[t], wanted)


def test_what_does_not_fit_is_refused() -> None:
    x = draw(2, 40)
    with pytest.raises(ValueError, match="approximate is 'fast', wanted 'tanh' or 'none'"):
        gelu_mul(x, "fast")
    with pytest.raises(ValueError, match=r"qkv has 40 columns, wanted at least .* heads of 8"):
        qk_norm_rope(x, torch.ones(8), torch.ones(8), x[:, :8], x[:, :8], 4, 2, 1e-6)
    with pytest.raises(ValueError, match=r"row is torch\.bool, wanted torch.int32 or torch.int64"):
        silu_mul_quant(x, torch.int8, 0, None, torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="float16 is not one of"):
        rms_norm_quant(x, torch.ones(40), 1e-6, torch.float16)
