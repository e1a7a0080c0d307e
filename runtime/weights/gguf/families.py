"""The families of models that GGUF files hold: each one's class, its metadata and its tensors in Hugging Face's words.

Source: gguf-py/gguf/constants.py and the conversion scripts of https://github.com/ggml-org/llama.cpp; what a file does
not say is what llama.cpp computes with then (src/llama-model.cpp, src/models).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_KEYS = {
    "embedding_length": "hidden_size", "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings", "rope.freq_base": "rope_theta",
}  # fmt: skip
_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """architecture, model_type  transformers' class and its configuration's

    keys    of the metadata, without the architecture's name -> in config.json
    fixed   of config.json what files need not say, or never do
    layer   parts of a layer -> modules in Hugging Face's layer; with a * one for each expert, else with the tensor's
            ending; a part given with its ending -> the whole name
    paired  rows of q and k are in the order of rotated pairs: first of each half, second of each half, …
    one_more  norms are stored as what they multiply by, which is one more than Hugging Face's weight
    """

    architecture: str
    model_type: str
    keys: Mapping[str, str] = field(default_factory=lambda: _KEYS)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    layer: Mapping[str, str] = field(default_factory=lambda: _LAYER)
    paired: bool = False
    one_more: bool = False


def family_of(metadata: Mapping[str, Any], where: str) -> Family:
    """Return the family of a file's model. Raises ValueError naming those that are served."""
    kind = metadata.get("general.architecture")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"{where}: general.architecture is {kind!r}, wanted one of {', '.join(FAMILIES)}; convert the model to"
            " safetensors"
        )
    if kind == "llama" and metadata.get("llama.expert_count"):
        return _MIXTRAL
    if kind == "deepseek2" and metadata.get("deepseek2.expert_gating_func", 1) != 1:  # V2's: softmax
        return _DEEPSEEK_V3
    return FAMILIES[kind]


def _experts(prefix: str = "mlp.experts.*.") -> dict[str, str]:
    return {f"ffn_{part}_exps": f"{prefix}{part}_proj" for part in ("gate", "up", "gate_up", "down")}


def _shared(module: str) -> dict[str, str]:
    return {f"ffn_{part}_shexp": f"mlp.{module}.{part}_proj" for part in ("gate", "up", "down")}


_MOE_KEYS = _KEYS | {
    "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}  # fmt: skip
_MOE_LAYER = {**_LAYER, "ffn_gate_inp": "mlp.gate", **_experts()}
_GEMMA_KEYS = _KEYS | {
    "attention.sliding_window": "sliding_window", "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}  # fmt: skip
_GEMMA_LAYER = _LAYER | {  # norms what attention and MLP give
    "ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_FEW = _KEYS | {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_MIXTRAL = Family(
    architecture="MixtralForCausalLM", model_type="mixtral", keys=_FEW, fixed={"sliding_window": None},
    layer=_MOE_LAYER, paired=True,
)  # fmt: skip
_DEEPSEEK: dict[str, Any] = {
    "keys": {
        **_MOE_KEYS, "attention.q_lora_rank": "q_lora_rank", "attention.kv_lora_rank": "kv_lora_rank",
        "leading_dense_block_count": "first_k_dense_replace", "expert_count": "n_routed_experts",
        "expert_shared_count": "n_shared_experts", "expert_weights_scale": "routed_scaling_factor",
        "expert_weights_norm": "norm_topk_prob", "expert_group_count": "n_group",
        "expert_group_used_count": "topk_group", "rope.dimension_count": "qk_rope_head_dim",
    },
    "fixed": {
        "q_lora_rank": None, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0, "norm_topk_prob": False,
        "n_group": 1, "topk_group": 1,
    },
    "layer": {
        **_MOE_LAYER, **_shared("shared_experts"), "attn_q_a": "self_attn.q_a_proj", "attn_q_b": "self_attn.q_b_proj",
        "attn_q_a_norm": "self_attn.q_a_layernorm", "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn_kv_a_norm": "self_attn.kv_a_layernorm", "attn_kv_b": "self_attn.kv_b_proj",
        "attn_k_b": "self_attn.k_b_proj", "attn_v_b": "self_attn.v_b_proj",
        "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    },
}  # fmt: skip
_DEEPSEEK_V3 = Family(architecture="DeepseekV3ForCausalLM", model_type="deepseek_v3", **_DEEPSEEK)

FAMILIES = {  # by general.architecture
    "deepseek2": Family(architecture="DeepseekV2ForCausalLM", model_type="deepseek_v2", **_DEEPSEEK),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM", model_type="gemma2", keys=_GEMMA_KEYS, layer=_GEMMA_LAYER, one_more=True,
        fixed={"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3": Family(
        architecture="Gemma3ForCausalLM", model_type="gemma3_text", keys=_GEMMA_KEYS, layer=_GEMMA_LAYER,
        one_more=True, fixed={"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gpt-oss": Family(
        architecture="GptOssForCausalLM", model_type="gpt_oss",
        keys={
            **_FEW, "expert_feed_forward_length": "intermediate_size", "attention.sliding_window": "sliding_window",
        },
        layer={
            **_LAYER, **_experts("mlp.experts."), "ffn_gate_inp": "mlp.router", "attn_sinks.weight": "self_attn.sinks",
            "post_attention_norm": "post_attention_layernorm",
        },
    ),
    "llama": Family(architecture="LlamaForCausalLM", model_type="llama", paired=True),
    "phi3": Family(
        architecture="Phi3ForCausalLM", model_type="phi3", fixed={"sliding_window": None},
        keys={
            **_KEYS, "attention.sliding_window": "sliding_window",
            "rope.scaling.original_context_length": "original_max_position_embeddings",
        },
        layer={**_LAYER, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    ),
    "qwen2": Family(architecture="Qwen2ForCausalLM", model_type="qwen2"),
    "qwen2moe": Family(
        architecture="Qwen2MoeForCausalLM", model_type="qwen2_moe", fixed={"norm_topk_prob": False},
        keys={**_MOE_KEYS, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        layer={**_MOE_LAYER, **_shared("shared_expert"), "ffn_gate_inp_shexp": "mlp.shared_expert_gate"},
    ),
    "qwen3": Family(architecture="Qwen3ForCausalLM", model_type="qwen3"),
    "qwen3moe": Family(
        architecture="Qwen3MoeForCausalLM", model_type="qwen3_moe", layer=_MOE_LAYER, fixed={"norm_topk_prob": True},
        keys={**_MOE_KEYS, "expert_weights_norm": "norm_topk_prob"},
    ),
}  # fmt: skip
