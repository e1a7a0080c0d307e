"""Tiny configurations of the mixtures of experts, and how one of our modules runs over the caches it wants."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from step_inputs import Schedule, Steps, run_schedule
from tiny_models import load_tiny, save_tiny
from torch import Tensor, nn
from transformers import GptOssConfig

from seamwise.runtime.build.kv_spec import KVCacheSpec
from seamwise.runtime.build.model_config import ModelConfig
from seamwise.runtime.build.runner_config import RunnerConfig

MLA = {
    "kv_lora_rank": 32, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
    "first_k_dense_replace": 1, "n_shared_experts": 2, "routed_scaling_factor": 1.5,
}  # fmt: skip
GROUPS = {"n_group": 4, "topk_group": 2}
SHARP_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7,
    "mscale_all_dim": 1.2,
}  # fmt: skip
# transformers 5.17's class has the limit of 7 in its code and reads none.
LIMIT = {"swiglu_limit": 0.5} if hasattr(GptOssConfig(), "swiglu_limit") else {}
MOE: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral, window": ("MixtralForCausalLM", {"num_local_experts": 5, "num_experts_per_tok": 1, "sliding_window": 6}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {
            "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 32,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe, a dense layer, biases": (
        "Qwen3MoeForCausalLM",
        {
            "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "mlp_only_layers": [0],
            "attention_bias": True,
        },
    ),
    "qwen3_moe, every other layer": (
        "Qwen3MoeForCausalLM",
        {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 2,
            "use_sliding_window": True, "sliding_window": 5,
        },
    ),
    "deepseek_v2": ("DeepseekV2ForCausalLM", MLA),
    "deepseek_v2, groups, no query latent": (
        "DeepseekV2ForCausalLM",
        {
            **MLA, **GROUPS, "q_lora_rank": None, "topk_method": "group_limited_greedy", "rope_parameters": SHARP_YARN,
            "attention_bias": True,
        },
    ),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {**MLA, **GROUPS, "rope_parameters": SHARP_YARN}),
    "deepseek_v3, halves": (
        "DeepseekV3ForCausalLM",
        {**MLA, "n_group": 1, "topk_group": 1, "rope_interleave": False, "norm_topk_prob": False},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "sliding_window": 5, **LIMIT},
    ),
}  # fmt: skip


@cache
def tiny_moe(family: str) -> tuple[Any, Path]:
    """Return transformers' model of a family, and where it is saved."""
    directory = Path(mkdtemp())
    architecture, changes = MOE[family]
    return save_tiny(directory, architecture, **changes), directory


@cache
def loaded_moe(family: str, entry: str) -> tuple[nn.Module, ModelConfig]:
    return load_tiny(tiny_moe(family)[1], entry)


def poisoned_caches(config: ModelConfig, entry: str, steps: Steps) -> list[list[Tensor]]:
    """Return the caches that this model wants, full of NaN."""
    options = RunnerConfig.for_model(
        config, dtype=torch.float32, device="cpu", entry=entry, block_size=steps.block_size
    )
    spec = KVCacheSpec.of(config, options)
    return [[cache.fill_(torch.nan) for cache in layer] for layer in spec.allocate(steps.num_blocks, "cpu")]


def run_moe(family: str, entry: str, requests: list[list[int]], schedule: Schedule, **options: Any) -> list[Tensor]:
    """Return the logits that one of our modules gives for each request."""
    model, config = loaded_moe(family, entry)
    steps = Steps(requests, **options)
    return run_schedule(model, steps, schedule, poisoned_caches(config, entry, steps))
