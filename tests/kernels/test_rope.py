"""Rotary embedding against transformers: interleaved pairs, partial heads, tables of several kinds, the write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from seamwise.kernels import kv_append, rope, rope_kv_write, rope_table
from seamwise.model_defs.hf_config import Reader
from seamwise.model_defs.rope import Rope


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def table(T: int, R: int) -> tuple[Tensor, Tensor]:
    return rope_table(torch.arange(T) * 37, 10000.0 ** (-torch.arange(R // 2) / (R // 2)), 1.0, torch.float32)


@pytest.mark.parametrize("R", [16, 8])
def test_interleaved_is_gptjs(R: int) -> None:
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb, create_sinusoidal_positions

    x, positions = draw(5, 3, 16), torch.arange(5) * 37
    sin, cos = create_sinusoidal_positions(200, R)[positions].chunk(2, -1)
    theirs = torch.cat((apply_rotary_pos_emb(x[None, ..., :R], sin[None], cos[None])[0], x[..., R:]), -1)
    torch.testing.assert_close(rope(x, *table(5, R), True), theirs)


def test_interleaved_gives_deepseeks_scores() -> None:
    """DeepSeek's own form also moves the columns, q's as k's, which scores do not see."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

    q, k, (cos, sin) = draw(5, 2, 16), draw(5, 2, 16, seed=1), table(5, 16)
    theirs = apply_rotary_pos_emb_interleave(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    ours = [rope(x, cos, sin, interleaved=True) for x in (q, k)]
    wanted = theirs[0] @ theirs[1].transpose(-1, -2)
    torch.testing.assert_close(torch.einsum("ihd,jhd->hij", *ours), wanted[0])
    torch.testing.assert_close(torch.cat((ours[0][..., ::2], ours[0][..., 1::2]), -1), theirs[0][0].transpose(0, 1))


@pytest.mark.parametrize("model", ["glm", "gpt_neox"])
def test_partial_is_glms_and_neoxs(model: str) -> None:
    from transformers.models.glm import modeling_glm
    from transformers.models.gpt_neox import modeling_gpt_neox

    x, (cos, sin) = draw(5, 3, 24), table(5, 8)
    module = modeling_glm if model == "glm" else modeling_gpt_neox
    heads_first = x.transpose(0, 1)[None]
    theirs, _ = module.apply_rotary_pos_emb(heads_first, heads_first, cos[None], sin[None])
    torch.testing.assert_close(rope(x, cos, sin, model == "glm"), theirs[0].transpose(0, 1))


def test_a_whole_head_in_parts_is_refused() -> None:
    x, (cos, sin) = draw(2, 1, 8), table(2, 10)
    with pytest.raises(ValueError, match="cos has 10 columns, wanted an even number up to the head's 8"):
        rope(x, cos, sin)
    with pytest.raises(ValueError, match="provider 'cpp' cannot serve this call: it turns whole heads in halves"):
        rope.run("cpp", x, cos[:, :8], sin[:, :8], True)
    with pytest.raises(ValueError, match="it turns whole heads in halves, got 6 of 8 columns"):
        rope.run("cpp", x, cos[:, :6], sin[:, :6])


def test_m_rope_is_qwen2_vls() -> None:
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding, apply_rotary_pos_emb

    sections = [4, 6, 6]
    config = Qwen2VLTextConfig(
        hidden_size=64, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=500,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
    )  # fmt: skip
    embedding = Qwen2VLRotaryEmbedding(config)
    positions, q = torch.randint(400, (3, 11), generator=torch.Generator().manual_seed(0)), draw(11, 2, 32)
    theirs = embedding(q, positions[:, None])
    ours = rope_table(positions, embedding.inv_freq, 1.0, torch.float32, sections)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other[0])
    turned, _ = apply_rotary_pos_emb(*[q.transpose(0, 1)[None]] * 2, *theirs)
    torch.testing.assert_close(rope(q, *ours), turned[0].transpose(0, 1))
    text = positions[:1].expand(3, -1)  # of text alone, all three positions are one
    for three, one in zip(
        rope_table(text, embedding.inv_freq, 1.0, torch.float32, sections),
        rope_table(text[0], embedding.inv_freq, 1.0, torch.float32),
        strict=True,
    ):
        torch.testing.assert_close(three, one)


def test_sections_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"sections \[2, 3\] want positions \(3, T\) and 5 speeds, got positions \(4,\)"
    ):
        rope_table(torch.arange(4), torch.ones(5), 1.0, torch.float32, [2, 3])
    with pytest.raises(ValueError, match=r"and 6 speeds, got positions .* and 5 speeds"):
        rope_table(torch.ones(3, 4, dtype=torch.int64), torch.ones(5), 1.0, torch.float32, [3, 3])


@pytest.mark.parametrize(
    "kind",
    [
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "factor": 8.0},
    ],
)
def test_scaled_speeds_are_served(kind: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {**kind, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=512, rope_parameters=parameters
    )  # fmt: skip
    scaled = Rope.from_hf(Reader(config.to_dict(), "config.json"), 32)
    positions = torch.arange(0, 500, 7)
    ours = rope_table(positions, torch.tensor(scaled.speeds), scaled.scaling, torch.float32)
    for mine, other in zip(ours, LlamaRotaryEmbedding(config)(draw(1), positions[None]), strict=True):
        torch.testing.assert_close(mine, other[0], rtol=1e-5, atol=1e-4)  # at 500 radians an ulp is 3e-5


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_write_is_rope_and_append(interleaved: bool) -> None:
    k, v, (cos, sin) = draw(5, 2, 16), draw(5, 2, 16, seed=1), table(5, 8)
    slots = torch.tensor([3, -1, 0, 9, 4])
    caches, wanted = [[torch.zeros(3, 2, 4, 16) for _ in range(2)] for _ in range(2)]
    assert rope_kv_write(k, v, cos, sin, *caches, slots, interleaved) is None
    kv_append(rope(k, cos, sin, interleaved), v, *wanted, slots)
    for cache, other in zip(caches, wanted, strict=True):
        assert torch.equal(cache, other) and bool(cache.any())
