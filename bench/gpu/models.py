"""The models that `seamwise bench gpu` runs with random weights: configurations as published, and tiny ones.

Source: https://huggingface.co/meta-llama/Meta-Llama-3-8B, https://huggingface.co/Qwen/Qwen3-30B-A3B,
https://huggingface.co/deepseek-ai/DeepSeek-R1, config.json.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REAL: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": 128256,
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "max_position_embeddings": 8192, "hidden_act": "silu", "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16",
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 40960,
        "hidden_act": "silu", "tie_word_embeddings": False,
    },
    "deepseek-r1": {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "dtype": "bfloat16",
        "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_nextn_predict_layers": 1, "num_attention_heads": 128, "num_key_value_heads": 128,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "first_k_dense_replace": 3, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "n_group": 8, "topk_group": 4, "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6, "rope_theta": 10000, "max_position_embeddings": 163840,
        "hidden_act": "silu", "tie_word_embeddings": False, "quantization_config": {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        },
    },
}  # fmt: skip
_SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
}  # fmt: skip
_FEW = {
    "llama-3-8b": {}, "qwen3-30b-a3b": {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2},
    "deepseek-r1": {
        "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 3,
        "num_key_value_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 16, "v_head_dim": 64, "first_k_dense_replace": 1, "n_routed_experts": 16,
        "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
    },
}  # fmt: skip


def configuration(name: str, tiny: bool) -> dict[str, Any]:
    """Return a model's config.json, or one of its family that is tiny."""
    real = REAL[name]
    return real | _SMALL | _FEW[name] if tiny else real


@contextmanager
def model_directory(name: str, tiny: bool) -> Iterator[Path]:
    """Give a directory that holds config.json alone, for load_format="dummy"."""
    with tempfile.TemporaryDirectory(prefix="seamwise-bench-") as home:
        (Path(home) / "config.json").write_text(json.dumps(configuration(name, tiny)))
        yield Path(home)
