"""Configurations that once stopped though transformers runs them: compiled, they give its logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import draw_tokens
from moe_families import GROUPS, MLA
from step_inputs import run_runner
from tiny_models import assert_within_budget, save_tiny

from seamwise import ModelRunner

QWEN3_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}
ONE_HEAD = {"num_attention_heads": 1, "num_key_value_heads": 1}
CASES: dict[str, tuple[str, dict[str, Any], str, torch.dtype]] = {
    # promises that names suggest and the class does not keep
    "exaone4": (
        "Exaone4ForCausalLM", {"sliding_window": 5, "sliding_window_pattern": 2}, "transformers", torch.float32
    ),
    "hunyuan": ("HunYuanDenseV1ForCausalLM", {"head_dim": 16}, "transformers", torch.float32),
    "apertus": ("ApertusForCausalLM", {}, "transformers", torch.float32),
    "lfm2": ("Lfm2ForCausalLM", {"layer_types": ["full_attention"] * 2}, "transformers", torch.float32),
    "afmoe": (
        "AfmoeForCausalLM",
        {**QWEN3_MOE, "num_dense_layers": 1},
        "transformers", torch.float32,
    ),
    "mixtral, bfloat16, small experts, theirs": (
        "MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 20},
        "transformers", torch.bfloat16,
    ),
    "deepseek_v3, no query latent, one group": (
        "DeepseekV3ForCausalLM", {**MLA, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_interleave": False},
        "transformers", torch.float32,
    ),
    "deepseek_v2, equal widths, ours": ("DeepseekV2ForCausalLM", {**MLA, "v_head_dim": 24}, "own", torch.float32),
    "deepseek_v3, no query latent": (
        "DeepseekV3ForCausalLM", {**MLA, **GROUPS, "q_lora_rank": None}, "transformers", torch.float32
    ),
    "deepseek_v2, equal widths": (
        "DeepseekV2ForCausalLM", {**MLA, "v_head_dim": 24}, "transformers", torch.float32
    ),
    "qwen3_moe, bfloat16, small experts": (
        "Qwen3MoeForCausalLM", {**QWEN3_MOE, "moe_intermediate_size": 20, "hidden_size": 36}, "own", torch.bfloat16
    ),
    "qwen3_moe, one head": ("Qwen3MoeForCausalLM", {**QWEN3_MOE, **ONE_HEAD}, "own", torch.float32),
    "gemma3, one head": (
        "Gemma3ForCausalLM", {**ONE_HEAD, "head_dim": 32, "query_pre_attn_scalar": 6}, "own", torch.float32
    ),
    "gpt_oss, heads of width 2": (
        "GptOssForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 2, "sliding_window": 5},
        "transformers", torch.float32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_gives_transformers_logits(name: str, tmp_path: Path) -> None:
    architecture, changes, entry, dtype = CASES[name]
    theirs = save_tiny(tmp_path, architecture, **changes)
    options = {"entry": entry, "disable_hybrid_kv_cache_manager": True}  # the steps here have one block table
    runner = ModelRunner.load(tmp_path, dtype=dtype, device="cpu", pack_dir=None, **options)
    requests = draw_tokens(4, 9, 3)
    got = run_runner(runner, requests, ({0: 6, 1: 2}, {0: 2, 1: 1}, {0: 1}))
    assert_within_budget(got, copy.deepcopy(theirs), requests)
