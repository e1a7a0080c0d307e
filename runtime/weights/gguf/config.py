"""A GGUF file's metadata as the config.json that the same model would have.

Source: the keys of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and of llama.cpp's converter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from seamwise.model_defs.hf_config import Reader
from seamwise.model_defs.rope import Rope
from seamwise.runtime.weights.formats import FORMATS

from .file import GgufHeader, read_gguf_header
from .quants import KINDS
from .weights import ROPE_FACTORS, huggingface_name

_ARCHITECTURES = {
    "gemma2": "Gemma2ForCausalLM", "gemma3": "Gemma3ForCausalLM", "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip
_KEYS = {
    "embedding_length": "hidden_size", "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings", "rope.freq_base": "rope_theta",
}  # fmt: skip
_GEMMA_KEYS = {
    "attention.sliding_window": "sliding_window", "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}  # fmt: skip
_BY_WIDTH = {"gemma2": 46, "gemma3": 62}  # layers of the one size that scales scores by its width, not by its heads'
_HEAD_WIDTHS = ("attention.key_length", "attention.value_length", "rope.dimension_count")  # all the same here
_SCALING = {"type": "rope_type", "factor": "factor", "original_context_length": "original_max_position_embeddings"}
# Keys whose usual value changes nothing; None: no value does.
_HARMLESS = {
    "vocab_size": None, "rope.scaling.finetuned": None, "tensor_data_layout": "Meta AI original pth",
    "attention.causal": True, "expert_count": 0, "expert_used_count": 0,
}  # fmt: skip
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def find_gguf(path: Path) -> Path | None:
    """Return the GGUF file that is a whole model: the path itself, or the one in a directory without config.json."""
    return None if (path / "config.json").exists() else FORMATS["gguf"].find(path)


def read_gguf_config(path: Path) -> dict[str, Any]:
    """Return what config.json would hold. Raises ValueError for a model that Hugging Face's names do not describe."""
    header = read_gguf_header(path)
    metadata, tensors = header.metadata, header.tensors
    kind = metadata.get("general.architecture")
    if kind not in _ARCHITECTURES:
        raise ValueError(
            f"{path}: general.architecture is {kind!r}, wanted one of {', '.join(_ARCHITECTURES)}; convert the model to"
            " safetensors"
        )
    own = {key.removeprefix(f"{kind}."): v for key, v in metadata.items() if key.startswith(f"{kind}.")}
    keys = _KEYS | (_GEMMA_KEYS if kind in _BY_WIDTH else {})
    known = {*keys, *_HEAD_WIDTHS, *(f"rope.scaling.{key}" for key in _SCALING)}
    for key, value in own.items():
        if key not in known and not (key in _HARMLESS and _HARMLESS[key] in (None, value)):
            raise ValueError(f"{path}: {kind}.{key} is {value!r:.80}, which is not served; convert it to safetensors")
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{path}: has no token_embd.weight; wanted a whole model")
    raw = {name: own[key] for key, name in keys.items() if key in own}
    raw |= {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": "gemma3_text" if kind == "gemma3" else kind,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "dtype": _dtype(header),
        "gguf_kinds": {
            name.removesuffix(".weight"): tensor.kind
            for stored, tensor in tensors.items()
            if len(tensor.shape) == 2
            and (
                (name := huggingface_name(stored, kind)) != "model.embed_tokens.weight"
                or "output.weight" not in tensors
            )
        },
        "eos_token_id": sorted({metadata[k] for e in _ENDS if (k := f"tokenizer.ggml.{e}") in metadata}),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
    }
    read = Reader(raw, str(path))
    widths = {own[key] for key in _HEAD_WIDTHS if key in own}
    head_dim = read.size("head_dim", read.size("hidden_size") // read.size("num_attention_heads"))
    if widths - {head_dim}:
        raise ValueError(f"{path}: the widths of heads {', '.join(_HEAD_WIDTHS)} differ, which is not served: {widths}")
    raw["head_dim"] = head_dim
    if kind in _BY_WIDTH:  # the file does not say it
        whole = read.size("num_hidden_layers") == _BY_WIDTH[kind]
        raw["query_pre_attn_scalar"] = raw["hidden_size"] // raw["num_attention_heads"] if whole else head_dim
    rope = _rope(header, own, raw)
    if rope and kind == "gemma3":  # of layers without a window
        raw["rope_scaling"] = rope
    elif rope:
        raw["rope_parameters"] = {"rope_theta": raw.get("rope_theta", 10000.0), **rope}
    return raw


def _dtype(header: GgufHeader) -> str:
    """Return the dtype of the matrices where they are not quantized, else bfloat16."""
    kinds = {t.kind for t in header.tensors.values() if len(t.shape) > 1}
    return {"F32": "float32", "F16": "float16"}.get(kinds.pop(), "bfloat16") if len(kinds) == 1 else "bfloat16"


def _rope(header: GgufHeader, own: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """Return the scaling of RoPE in Hugging Face's words.

    Llama 3's stands in a file as the tensor of its effect, one divisor for each speed; all models that were published
    with it have the same frequency factors and original length, which is checked against that tensor.
    """
    scaling = {name: own[f"rope.scaling.{key}"] for key, name in _SCALING.items() if f"rope.scaling.{key}" in own}
    if scaling.get("rope_type") == "none":
        scaling = {}
    if ROPE_FACTORS not in header.tensors:
        return scaling
    tensor = header.tensors[ROPE_FACTORS]
    E = raw["head_dim"]
    if tensor.kind != "F32" or tensor.shape != (E // 2,) or scaling:
        raise ValueError(
            f"{header.path}: {ROPE_FACTORS} is {tensor.kind} {tensor.shape} beside rope.scaling {scaling}, wanted F32"
            f" ({E // 2},) alone"
        )
    stored = KINDS["F32"].values(tensor.where.read())
    llama3 = {
        "rope_type": "llama3", "factor": float(f"{float(stored.max()):.5g}"), "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    plain, scaled = (Rope.from_hf(Reader(r, str(header.path)), E) for r in (raw, {**raw, "rope_parameters": llama3}))
    if not torch.allclose(torch.tensor(plain.speeds) / torch.tensor(scaled.speeds), stored, rtol=1e-4):
        raise ValueError(f"{header.path}: {ROPE_FACTORS} is not Llama 3's, which is not served; convert to safetensors")
    return llama3
