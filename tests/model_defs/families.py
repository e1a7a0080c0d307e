"""Tiny configurations of every family that Seamwise defines; no value that matters is one that would change nothing."""

from __future__ import annotations

import copy
import random
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from step_inputs import Schedule, Steps, run_schedule
from tiny_models import SIZES, assert_within_budget, load_tiny, save_tiny

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 6, "final_logit_softcapping": 1.5}
MIXED = ["full_attention", "sliding_attention"]
LOCAL_AND_GLOBAL = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama, tied, wide heads": (
        "LlamaForCausalLM", {"tie_word_embeddings": True, "head_dim": 12, "num_key_value_heads": 1}
    ),
    "llama, biases, llama3 rope": (
        "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}
    ),
    "llama, yarn": ("LlamaForCausalLM", {"rope_parameters": YARN}),
    "llama, gelu, dynamic rope within its length": (
        "LlamaForCausalLM",
        {"hidden_act": "gelu", "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "mistral": ("MistralForCausalLM", {"sliding_window": 5}),
    "mistral, no window": ("MistralForCausalLM", {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2, upper window": (
        "Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    ),
    "qwen2, every window": (
        "Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "qwen3, biases, windows": (
        "Qwen3ForCausalLM",
        {"head_dim": 8, "attention_bias": True, "use_sliding_window": True, "sliding_window": 3, "layer_types": MIXED},
    ),
    "phi3": ("Phi3ForCausalLM", {"sliding_window": 9}),
    "phi3, partial rope": ("Phi3ForCausalLM", {"partial_rotary_factor": 0.5}),
    "gemma2": (
        "Gemma2ForCausalLM", {**GEMMA, "sliding_window": 4, "attn_logit_softcapping": 2.0, "tie_word_embeddings": True}
    ),
    "gemma2, no caps": (
        "Gemma2ForCausalLM", {**GEMMA, "final_logit_softcapping": None, "attn_logit_softcapping": None}
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {**GEMMA, "sliding_window": 4, "sliding_window_pattern": 2, "rope_parameters": LOCAL_AND_GLOBAL},
    ),
}  # fmt: skip
ONE_EACH = [name for name in FAMILIES if "," not in name]
ENTRIES = ("own", "transformers")


@cache
def tiny(family: str) -> tuple[Any, dict[str, Any], Any, Path]:
    """Return transformers' model of a family, our modules by entry, the configuration, and where all that is saved."""
    directory = Path(mkdtemp())
    architecture, changes = FAMILIES[family]
    theirs = save_tiny(directory, architecture, **changes)
    loaded = {entry: load_tiny(directory, entry) for entry in ENTRIES}
    return theirs, {e: m for e, (m, _) in loaded.items()}, loaded["own"][1], directory


def run(family: str, entry: str, requests: list[list[int]], schedule: Schedule, **options: Any) -> list[torch.Tensor]:
    """Return the logits that one of our modules gives for each request."""
    _, ours, config, _ = tiny(family)
    steps = Steps(requests, **options)
    caches = steps.caches(config.num_layers, config.num_kv_heads, config.head_dim, torch.float32)
    return run_schedule(ours[entry], steps, schedule, caches)


def check(family: str, entry: str, requests: list[list[int]], schedule: Schedule, **options: Any) -> None:
    """Hold our logits to transformers', in float32."""
    theirs = copy.deepcopy(tiny(family)[0])
    assert_within_budget(run(family, entry, requests, schedule, **options), theirs, requests)


def draw_tokens(seed: int, *lengths: int) -> list[list[int]]:
    choose = random.Random(seed)
    return [[choose.randrange(SIZES["vocab_size"]) for _ in range(n)] for n in lengths]
