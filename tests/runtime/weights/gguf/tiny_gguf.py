"""A transformers model as llama.cpp's converter would write it, by the names and writers of its own package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter


def write_gguf(
    model: Any, path: Path, kind: str = "F32", tokenizer: dict[str, Any] | None = None, kinds: Mapping[str, str] = {}
) -> None:
    """Write a Gemma 2 or 3, Llama, Qwen2 or Qwen3; its matrices as `kind` or as `kinds` names them, else float32."""
    config = model.config
    model_type = config.model_type.removesuffix("_text")
    gemma, rope = model_type.startswith("gemma"), config.rope_parameters
    if model_type == "gemma3":
        rope = rope["full_attention"]
    writer = GGUFWriter(path, model_type)
    writer.add_block_count(config.num_hidden_layers), writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size), writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads), writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps), writer.add_rope_freq_base(rope["rope_theta"])
    if gemma:
        writer.add_sliding_window(config.sliding_window)
    if model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR), writer.add_rope_scaling_factor(rope["factor"])
    if config.model_type == "llama":
        writer.add_rope_dimension_count(config.head_dim), writer.add_vocab_size(config.vocab_size)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim), writer.add_value_length(config.head_dim)
    write_tokenizer(writer, tokenizer or {})
    architecture = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[model_type]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(config))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            values = pair_rows(values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        if gemma and name.endswith("norm.weight"):
            values = values + 1
        wanted = kinds.get(name, kind) if values.ndim > 1 else "F32"
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        writer.add_tensor(stored, encode(values, wanted), raw_dtype=GGMLQuantizationType[wanted])
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()


def encode(values: np.ndarray, kind: str) -> np.ndarray:
    """Return the bytes of a matrix, row by row: those of the gguf package, which writes no kind of 256 values a block.

    For these they are random, and the same for the same row; scales are such that values are of the size of 1/16.
    """
    of = GGMLQuantizationType[kind]
    if kind not in _RANDOM:
        return gguf.quantize(values, of)
    block, num_bytes = gguf.GGML_QUANT_SIZES[of]
    rows = []
    for row in values:
        seed = list(row[:8].tobytes())
        raw = np.random.default_rng(seed).integers(0, 256, (len(row) // block, num_bytes), dtype=np.uint8)
        for at, scale in _RANDOM[kind].items():
            raw[:, at : at + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
        rows.append(raw.reshape(-1))
    return np.stack(rows)


_RANDOM = {"Q4_K": {0: 2e-4, 2: 1.5e-3}, "Q6_K": {208: 3e-5}}  # where in a block float16 scales stand


def write_tokenizer(writer: GGUFWriter, described: dict[str, Any]) -> None:
    for key, value in described.items():
        add = writer.add_array if isinstance(value, list) else None
        if add is None:
            add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add(f"tokenizer.{key}", value)


def pair_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """The i-th of a head's first half, then the i-th of its second: so that rotated pairs are neighbours."""
    out = np.empty_like(rows)
    width = len(rows) // heads
    for head in range(heads):
        for i in range(width // 2):
            out[head * width + 2 * i] = rows[head * width + i]
            out[head * width + 2 * i + 1] = rows[head * width + width // 2 + i]
    return out


def llama3_divisors(config: Any) -> np.ndarray:
    """By how much transformers slows each pair of columns down."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    slowed = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()
    columns = np.arange(0, config.head_dim, 2, dtype=np.float32)
    return (config.rope_parameters["rope_theta"] ** (-columns / config.head_dim) / slowed).astype(np.float32)
