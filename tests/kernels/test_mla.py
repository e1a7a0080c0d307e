"""Multi-head latent attention against transformers' DeepSeek-V3, with a paged cache filled in steps."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from laws import check, using
from torch import Tensor

from seamwise.kernels import mla_append, mla_decode, mla_prefill
from seamwise.kernels.cpu import instruction_set
from seamwise.kernels.cpu.attention_cpu import cascade

HEADS, NOPE, ROPE, VALUE, LATENT, BLOCK = 4, 16, 8, 12, 32, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What transformers' attention computes from a sequence, in float64, and its result."""

    q_nope_THN: Tensor
    q_rope_THR: Tensor
    latent_TC: Tensor
    rope_TR: Tensor
    kv_b_HXC: Tensor
    o_proj: Tensor
    scale: float
    expected_TD: Tensor


@pytest.fixture(scope="module")
def layer() -> Layer:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    torch.manual_seed(0)
    config = DeepseekV3Config(
        hidden_size=48, num_attention_heads=HEADS, num_key_value_heads=HEADS, q_lora_rank=24, kv_lora_rank=LATENT,
        qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE, v_head_dim=VALUE, attn_implementation="eager",
    )  # fmt: skip
    module = theirs.DeepseekV3Attention(config, 0).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        tokens = 19
        x = torch.randn(1, tokens, 48, dtype=torch.float64)
        angles = theirs.DeepseekV3RotaryEmbedding(config)(x, torch.arange(tokens)[None])
        mask = torch.full((tokens, tokens), float("-inf"), dtype=x.dtype).triu(1)[None, None]
        expected, _ = module(x, angles, mask)
        q = module.q_b_proj(module.q_a_layernorm(module.q_a_proj(x))).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        latent, k_rope = module.kv_a_proj_with_mqa(x).split([LATENT, ROPE], -1)
        q_rope, k_rope = theirs.apply_rotary_pos_emb_interleave(q[..., NOPE:], k_rope[:, None], *angles)
        return Layer(
            q_nope_THN=q[0, ..., :NOPE].transpose(0, 1), q_rope_THR=q_rope[0].transpose(0, 1),
            latent_TC=module.kv_a_layernorm(latent)[0], rope_TR=k_rope[0, 0],
            kv_b_HXC=module.kv_b_proj.weight.unflatten(0, (HEADS, NOPE + VALUE)), o_proj=module.o_proj.weight,
            scale=module.scaling, expected_TD=expected[0],
        )  # fmt: skip


def attend(layer: Layer, cache: Tensor, first: int, last: int, blocks: Tensor, form: str) -> Tensor:
    """Append tokens first : last and attend with them; return the layer's result."""
    slots = torch.arange(first, last)
    mla_append(
        layer.latent_TC[first:last], layer.rope_TR[first:last], cache, blocks[slots // BLOCK] * BLOCK + slots % BLOCK
    )
    q_nope_THN, q_rope_THR = layer.q_nope_THN[first:last], layer.q_rope_THR[first:last]
    batch = (blocks[None].int(), torch.tensor([last], dtype=torch.int32), torch.tensor([0, last - first]).int())
    if form == "mla_decode":
        absorbed_THC = torch.einsum("thn,hnc->thc", q_nope_THN, layer.kv_b_HXC[:, :NOPE])
        out_THC = mla_decode(torch.cat((absorbed_THC, q_rope_THR), -1), cache, *batch, layer.scale, LATENT)
        out_THV = torch.einsum("thc,hvc->thv", out_THC, layer.kv_b_HXC[:, NOPE:])
    else:
        out_THV = mla_prefill.run(form, q_nope_THN, q_rope_THR, cache, layer.kv_b_HXC, *batch, layer.scale, None)
    return out_THV.flatten(1) @ layer.o_proj.T


@pytest.mark.parametrize("form", ["mla_decode", "torch", "absorbed"])
@pytest.mark.parametrize("steps", [[19], [11, 1, 1, 5, 1]])
def test_attention_agrees_with_transformers(layer: Layer, steps: list[int], form: str) -> None:
    """Absorbed by hand, naive, and as mla_prefill chooses for a CPU."""
    blocks = torch.tensor([5, 2, 6, 1, 3])
    cache = torch.full((7, BLOCK, LATENT + ROPE), torch.nan, dtype=torch.float64)
    done, results = 0, []
    for count in steps:
        results.append(attend(layer, cache, done, done + count, blocks, form))
        done += count
    torch.testing.assert_close(torch.cat(results), layer.expected_TD)


def test_a_float8_cache_holds_rows_over_its_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    rows_TE = torch.randn(8, 48, generator=generator)
    cache, scale = torch.zeros(2, 4, 48, dtype=torch.float8_e4m3fn), torch.full((1,), 0.01)
    slots = torch.tensor([7, 6, 5, -1, 3, 2, 1, 0])
    mla_append(rows_TE[:, :32], rows_TE[:, 32:], cache, slots, scale)
    stored = cache.flatten(0, 1).flip(0).float() * 0.01
    rows_TE[3] = 0.0  # nobody wrote it
    torch.testing.assert_close(stored, rows_TE, rtol=2**-4, atol=0.01 * 2**-10)
    mla_append(rows_TE[:, :32] * 1e6, rows_TE[:, 32:], cache, slots, scale)
    assert float(cache.float().abs().max()) == 448.0, "it saturates"


@pytest.mark.parametrize("name", instruction_set.FLAGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpp_gives_the_same_bits_whatever_is_computed_beside_a_query(name: str, dtype: torch.dtype) -> None:
    """Within the budget; a query alone, on two threads, beside one that begins alike, from the same in float8."""
    if name not in instruction_set.runnable():
        pytest.skip(f"this machine does not run {name}")
    threads = torch.get_num_threads()
    with using(name):
        for rope, float8 in ((16, False), (32, True)):
            sizes = {"R": 2, "queries": 3, "context": 520, "H": 7, "C": 256, "rope": rope, "P": 16, "float8": float8}
            q, cache, table, lengths, starts, *rest = mla_decode.make_inputs(sizes, dtype=dtype, device="cpu")
            table[1, :32] = table[0, :32]
            args = (q, cache, table, lengths, starts, *rest)
            assert mla_decode.choose(args).name == "cpp"
            torch.set_num_threads(1)
            (out,) = check(mla_decode, "cpp", args)
            spared = torch.zeros(1, dtype=torch.int64)
            torch.set_num_threads(2)
            assert torch.equal(mla_decode.run("cpp", *args), out)
            with cascade(spared):
                assert torch.equal(mla_decode.run("cpp", *args), out) and int(spared) == 8
            torch.set_num_threads(threads)
            for r, i in ((0, 0), (1, 1), (1, 2)):
                alone = (q[r * 3 + i :][:1], cache, table[r : r + 1], lengths[r : r + 1] - (2 - i), starts[:2] // 3)
                assert torch.equal(mla_decode.run("cpp", *alone, *rest)[0], out[r * 3 + i])
            if float8:
                wide = mla_decode.run("cpp", q, cache.to(dtype), table, lengths, starts, *rest)
                assert torch.equal(wide, out)


def test_cpp_refuses_what_it_cannot_serve_by_name() -> None:
    sizes = {"R": 1, "queries": 1, "context": 9, "H": 2, "C": 32, "rope": 8, "P": 4}
    narrow = mla_decode.make_inputs(sizes, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="columns and latents that are multiples of 16"):
        mla_decode.run("cpp", *narrow)
    args = mla_decode.make_inputs(sizes | {"rope": 16}, dtype=torch.float32, device="cpu")
    apart = torch.zeros(*args[1].shape[:2], 96)[..., :48]
    with pytest.raises(ValueError, match="blocks whose rows lie together"):
        mla_decode.run("cpp", args[0], apart, *args[2:])
    args[2][0, 0] = 99
    with pytest.raises(ValueError, match=r"mla_decode: block_table\[0\] names blocks outside"):
        mla_decode.run("cpp", *args)
