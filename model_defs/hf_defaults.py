"""What a config.json means by the keys that it leaves out: the defaults of transformers' configuration classes.

Only of the families defined here, and of the keys that they read; for these no configuration imports transformers. A
test holds every value, and that no key is missing, to the classes themselves.
Source: transformers' configuration classes, https://huggingface.co/docs/transformers/main_classes/configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .hf_config import OLDER_NAMES

_LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "attention_bias": False,
    "mlp_bias": False, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MISTRAL = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "sliding_window": 4096,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_QWEN2 = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu", "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "use_sliding_window": False, "sliding_window": 4096,
    "tie_word_embeddings": False,
}  # fmt: skip
_GEMMA = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
    "attention_bias": False, "query_pre_attn_scalar": 256, "sliding_window": 4096, "tie_word_embeddings": True,
    "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
_GPT_OSS_ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip

DEFAULTS: dict[str, Mapping[str, Any]] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _MISTRAL,
    "MixtralForCausalLM": {
        **_MISTRAL, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "Qwen2ForCausalLM": {**_QWEN2, "max_window_layers": 28},
    "Qwen3ForCausalLM": {**_QWEN2, "head_dim": 128, "attention_bias": False, "max_window_layers": 28},
    "Qwen3MoeForCausalLM": {
        **_QWEN2, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_key_value_heads": 4,
        "attention_bias": False, "decoder_sparse_step": 1, "moe_intermediate_size": 768, "num_experts_per_tok": 8,
        "num_experts": 128, "norm_topk_prob": False, "mlp_only_layers": None,
    },
    "Phi3ForCausalLM": {
        "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": None, "hidden_act": "silu", "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "sliding_window": None,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 32000,
    },
    "Gemma2ForCausalLM": {
        **_GEMMA, "vocab_size": 256000, "max_position_embeddings": 8192, "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0, "rope_theta": 1e4, "use_bidirectional_attention": None,
    },
    "Gemma3ForCausalLM": {
        **_GEMMA, "vocab_size": 262208, "max_position_embeddings": 131072, "final_logit_softcapping": None,
        "attn_logit_softcapping": None, "use_bidirectional_attention": False,
    },
    "DeepseekV2ForCausalLM": {
        **_LLAMA, "vocab_size": 102400, "first_k_dense_replace": 0, "kv_lora_rank": 512, "q_lora_rank": 1536,
        "n_group": None, "topk_group": None, "n_routed_experts": 64, "n_shared_experts": 2, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "routed_scaling_factor": 1.0, "topk_method": "greedy",
        "norm_topk_prob": False, "num_experts_per_tok": None, "moe_intermediate_size": 1407,
    },
    "DeepseekV3ForCausalLM": {
        "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "hidden_act": "silu", "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6, "rope_theta": 1e4, "attention_bias": False, "rope_interleave": True,
        "first_k_dense_replace": 3, "kv_lora_rank": 512, "q_lora_rank": 1536, "n_group": 8, "topk_group": 4,
        "n_routed_experts": 256, "n_shared_experts": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
    },
    "GptOssForCausalLM": {
        "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "hidden_act": "silu",
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 150000.0,
        "rope_parameters": _GPT_OSS_ROPE, "attention_bias": True, "sliding_window": 128, "num_experts": 128,
        "num_experts_per_tok": 4, "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "tie_word_embeddings": False,
    },
}  # fmt: skip


def completed(architecture: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json with the keys that it leaves out; null is no such key, it says that there is none."""
    known = DEFAULTS.get(architecture, {})
    given = {name for name in known if any(one in raw for one in (name, *OLDER_NAMES.get(name, ())))}
    if raw.get("rope_scaling"):  # transformers 4's name for the same
        given.add("rope_parameters")
    return {**raw, **{name: value for name, value in known.items() if name not in given}}
