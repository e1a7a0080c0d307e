"""Models with experts, latents or joined projections as llama.cpp's converter would write them, by its own package."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from tiny_gguf import encode, pair_rows, write_tokenizer

_NAMES = {"deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2", "mixtral": "llama", "gpt_oss": "gpt-oss"}


def write_family(
    model: Any, path: Path, kind: str = "F32", kinds: Mapping[str, str] = {}, *, older: bool = False,
    parts_of: int = 0, tokenizer: dict[str, Any] | None = None, experts: str = "stacked",
) -> None:  # fmt: skip
    """Write a model; its matrices as `kind`, or as `kinds` says of a part of their name in the file.

    parts_of  how many tensors stand in each part of several; 0: one file
    experts  "stacked"; "apart": a tensor for each, as files of early 2024 have it; "fused": gate and up in one tensor
    older  DeepSeek's latents expanded by one matrix, and nothing said of groups, as files of early 2025 have it
    """
    config = model.config
    arch = _NAMES.get(config.model_type, config.model_type.replace("_", ""))
    writer = GGUFWriter(path, arch, split_max_tensors=parts_of)
    write_sizes(writer, config, older)
    write_tokenizer(writer, tokenizer or {})
    names = gguf.get_tensor_name_map(
        {name: one for one, name in gguf.MODEL_ARCH_NAMES.items()}[arch], config.num_hidden_layers
    )
    for factors in ("long", "short") if config.rope_parameters["rope_type"] == "longrope" else ():
        numbers = np.array(config.rope_parameters[f"{factors}_factor"], np.float32)
        writer.add_tensor(f"rope_factors_{factors}.weight", numbers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for piece, values in pieces(name, tensor.float().numpy(), config, older):
            stored = names.get_name(piece, try_suffixes=(".weight", ".bias"))
            assert stored is not None, piece
            plain = values.ndim == 1 or "bias" in stored or "ffn_gate_inp" in stored
            of = "F32" if plain else next((k for part, k in kinds.items() if part in stored), kind)
            rows = values if plain else encode_all(np.ascontiguousarray(values), of)
            if "gate_exps" in stored and experts == "fused":
                gate = rows  # up comes next
                continue
            if "up_exps" in stored and experts == "fused":
                stored, rows = stored.replace("up_exps", "gate_up_exps"), np.concatenate([gate, rows], 1)
            apart = experts == "apart" and "_exps" in stored
            for e, one in enumerate(rows) if apart else [(-1, rows)]:
                name_of_one = stored.replace("_exps", f".{e}") if apart else stored
                writer.add_tensor(name_of_one, np.ascontiguousarray(one), raw_dtype=GGMLQuantizationType[of])
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()


def encode_all(values: np.ndarray, kind: str) -> np.ndarray:
    """Return the bytes of a matrix, or of each one of a stack."""
    flat = encode(values.reshape(-1, values.shape[-1]), kind)
    return flat.reshape(*values.shape[:-1], flat.shape[-1])


def write_sizes(writer: GGUFWriter, config: Any, older: bool) -> None:
    kind, rope = config.model_type, config.rope_parameters
    mla = kind.startswith("deepseek")
    writer.add_block_count(config.num_hidden_layers), writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size), writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1 if mla and not older else config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps), writer.add_rope_freq_base(rope["rope_theta"])
    if kind in ("mixtral", *(k for k in _NAMES if mla)):
        writer.add_vocab_size(config.vocab_size)
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN), writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "beta_fast" in rope:
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if not mla and kind != "phi3" and getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim), writer.add_value_length(config.head_dim)
    if kind != "phi3":
        writer.add_expert_count(getattr(config, "num_local_experts", None) or config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if width := getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(width)
    if kind == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if kind == "gpt_oss":
        writer.add_sliding_window(config.sliding_window)
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if kind == "mixtral":
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    if kind == "phi3":
        turned = int(rope.get("partial_rotary_factor", 1.0) * config.hidden_size) // config.num_attention_heads
        original = config.original_max_position_embeddings
        writer.add_rope_dimension_count(turned), writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_sliding_window(config.sliding_window or 0)
        if rope["rope_type"] == "longrope":
            scale = config.max_position_embeddings / original
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
    if mla:
        _write_latents(writer, config, older)


def _write_latents(writer: GGUFWriter, config: Any, older: bool) -> None:
    key, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    C, rope = config.kv_lora_rank, config.rope_parameters
    writer.add_kv_lora_rank(C), writer.add_rope_dimension_count(config.qk_rope_head_dim)
    if config.q_lora_rank:
        writer.add_q_lora_rank(config.q_lora_rank)
    if older:
        writer.add_key_length(key), writer.add_value_length(value)
    else:
        writer.add_key_length(C + config.qk_rope_head_dim), writer.add_value_length(C)
        writer.add_key_length_mla(key), writer.add_value_length_mla(value)
        writer.add_expert_group_count(config.n_group), writer.add_expert_group_used_count(config.topk_group)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    sigmoid = config.model_type == "deepseek_v3"
    if sigmoid or not older:
        gating = gguf.ExpertGatingFuncType.SIGMOID if sigmoid else gguf.ExpertGatingFuncType.SOFTMAX
        writer.add_expert_gating_func(gating)
    if config.norm_topk_prob:
        writer.add_expert_weights_norm(True)
    if "mscale_all_dim" in rope:
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def pieces(name: str, values: np.ndarray, config: Any, older: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Yield what the converter makes of a tensor: names that its package maps, and values."""
    kind = config.model_type
    owner, _, leaf = name.rpartition(".")
    if kind == "mixtral" and ("q_proj" in name or "k_proj" in name):
        values = pair_rows(values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
    if leaf.startswith(("gate_up_proj", "down_proj")) and owner.endswith("experts"):
        leaf, _, bias = leaf.partition("_bias")[0], None, leaf.endswith("_bias")
        end = "bias" if bias else "weight"
        if kind == "gpt_oss" and not bias:
            values = values.swapaxes(1, 2)
        if leaf == "down_proj":
            yield f"{owner}.down_proj.{end}", values
        elif kind == "gpt_oss":
            yield f"{owner}.gate_proj.{end}", values[:, ::2]
            yield f"{owner}.up_proj.{end}", values[:, 1::2]
        else:
            half = values.shape[1] // 2
            yield f"{owner}.gate_proj.{end}", values[:, :half]
            yield f"{owner}.up_proj.{end}", values[:, half:]
    elif name.endswith("kv_b_proj.weight") and not older:
        heads = values.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
        keys, rest = np.split(heads, [config.qk_nope_head_dim], 1)
        yield name.replace("kv_b_proj", "k_b_proj"), keys.swapaxes(1, 2)
        yield name.replace("kv_b_proj", "v_b_proj"), rest
    elif name.endswith("e_score_correction_bias"):
        yield name.replace("_bias", ".bias"), values
    elif name.endswith("sinks"):
        yield f"{name}.weight", values
    else:
        yield name, values
