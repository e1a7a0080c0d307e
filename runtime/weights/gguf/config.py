"""A GGUF file's metadata as the config.json that the same model would have.

Source: the keys of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and of llama.cpp's converter.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from seamwise.model_defs.hf_config import Reader
from seamwise.model_defs.rope import Rope
from seamwise.runtime.weights.experts import stacked_name
from seamwise.runtime.weights.file_formats import FORMATS

from .families import Family, family_of
from .file import GgufHeader, read_gguf_header
from .quants import KINDS
from .weights import LONGROPE_FACTORS, ROPE_FACTORS, huggingface_name

_BY_WIDTH = {"gemma2": 46, "gemma3": 62}  # layers of the one size that scales scores by its width, not by its heads'
_HEAD_WIDTHS = ("attention.key_length", "attention.value_length", "rope.dimension_count")  # all the same here
_MLA_WIDTHS = ("attention.key_length_mla", "attention.value_length_mla")  # files before these have them as above
_SCALING = {
    "type": "rope_type", "factor": "factor", "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow",
}  # fmt: skip
_LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"
_OWN = {  # what only these mean something by
    "deepseek2": (*_MLA_WIDTHS, "expert_gating_func", _LOG_MULTIPLIER),
    "phi3": ("rope.scaling.attn_factor",),
}
# Keys whose usual value changes nothing; None: no value does.
_HARMLESS = {
    "vocab_size": None, "rope.scaling.finetuned": None, "tensor_data_layout": "Meta AI original pth",
    "attention.causal": True, "expert_count": 0, "expert_used_count": 0, "expert_gating_func": 1,
    "expert_weights_scale": 1.0, "rope.scaling.yarn_ext_factor": 1.0,
}  # fmt: skip
_DERIVED = ("head_dim", "num_key_value_heads", "original_max_position_embeddings")
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def find_gguf(path: Path) -> Path | None:
    """Return the GGUF file that is a whole model: the path itself, or the one in a directory without config.json."""
    return None if (path / "config.json").exists() else FORMATS["gguf"].find(path)


def read_gguf_config(path: Path) -> dict[str, Any]:
    """Return what config.json would hold. Raises ValueError for a model that Hugging Face's names do not describe."""
    header = read_gguf_header(path)
    metadata, tensors = header.metadata, header.tensors
    family, kind = family_of(metadata, str(path)), metadata["general.architecture"]
    own = {key.removeprefix(f"{kind}."): v for key, v in metadata.items() if key.startswith(f"{kind}.")}
    keys = family.keys
    known = {*keys, *_HEAD_WIDTHS, *(f"rope.scaling.{key}" for key in _SCALING), *_OWN.get(kind, ())}
    for key, value in own.items():
        if key not in known and not (key in _HARMLESS and _HARMLESS[key] in (None, value)):
            raise ValueError(f"{path}: {kind}.{key} is {value!r:.80}, which is not served; convert it to safetensors")
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{path}: has no token_embd.weight; wanted a whole model")
    raw = {"rope_theta": 10000.0, **family.fixed, **{name: own[key] for key, name in keys.items() if key in own}}
    for key, name in keys.items():  # else a class's default would stand for it
        if name not in raw and name not in _DERIVED:
            raise ValueError(f"{path}: has no {kind}.{key}; convert the model again, with a newer llama.cpp")
    kinds_of_experts, raw["gguf_experts"] = _experts(header, family)
    raw |= {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "dtype": _dtype(header),
        "gguf_kinds": {
            name.removesuffix(".weight"): tensor.kind
            for stored, tensor in tensors.items()
            if len(tensor.shape) == 2
            and ".experts." not in (name := huggingface_name(stored, family))
            and (name != "model.embed_tokens.weight" or "output.weight" not in tensors)
        }
        | kinds_of_experts,
        "eos_token_id": sorted({metadata[k] for e in _ENDS if (k := f"tokenizer.ggml.{e}") in metadata}),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
    }
    read = Reader(raw, str(path))
    if kind == "deepseek2":
        _set_latents(read, raw, own)
    else:
        _set_heads(read, raw, own, kind)
    if kind in _BY_WIDTH:  # the file does not say it
        whole = read.size("num_hidden_layers") == _BY_WIDTH[kind]
        raw["query_pre_attn_scalar"] = raw["hidden_size"] // raw["num_attention_heads"] if whole else raw["head_dim"]
    if _experts_in_mxfp4(header):
        raw["quantization_config"] = {"quant_method": "mxfp4"}
    rope = _longrope(header, own) if kind == "phi3" else _rope(header, own, raw)
    if rope and kind == "gemma3":  # of layers without a window
        raw["rope_scaling"] = rope
    elif rope:
        raw["rope_parameters"] = {"rope_theta": raw["rope_theta"], **rope}
    return raw


def _set_heads(read: Reader, raw: dict[str, Any], own: Mapping[str, Any], kind: str) -> None:
    """Put what the file says of a head's width, which is one for keys, values and what turns (of Phi-3, a part)."""
    heads = read.size("num_attention_heads")
    raw.setdefault("num_key_value_heads", heads)
    head_dim = raw["head_dim"] = read.size("head_dim", read.size("hidden_size") // heads)
    widths = {key: own[key] for key in _HEAD_WIDTHS if key in own}
    if kind == "phi3":
        turned = Reader(widths, read.where).size("rope.dimension_count", head_dim)
        raw["partial_rotary_factor"] = turned / head_dim
        raw["sliding_window"] = raw["sliding_window"] or None  # 0: none
        raw.setdefault("original_max_position_embeddings", raw["max_position_embeddings"])
        widths.pop("rope.dimension_count", None)
    if any(width != head_dim for width in widths.values()):
        raise ValueError(f"{read.where}: the widths of heads differ, which is not served: {widths}, wanted {head_dim}")


def _set_latents(read: Reader, raw: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Put DeepSeek's widths of heads, and how it chooses experts."""
    has_mla = all(key in own for key in _MLA_WIDTHS)
    key, value = (Reader(own, read.where).size(one) for one in (_MLA_WIDTHS if has_mla else _HEAD_WIDTHS[:2]))
    rotary = raw["head_dim"] = read.size("qk_rope_head_dim")
    raw |= {"qk_nope_head_dim": key - rotary, "v_head_dim": value}
    raw["num_key_value_heads"] = read.size("num_attention_heads")  # a file may say 1, for its one latent
    if own.get("expert_gating_func", 1) not in (1, 2):
        raise ValueError(f"{read.where}: deepseek2.expert_gating_func is {own['expert_gating_func']}, wanted 1 or 2")
    if raw["model_type"] == "deepseek_v2":
        raw["topk_method"] = "greedy" if raw["n_group"] == 1 else "group_limited_greedy"
    if "expert_group_count" not in own:
        older = "says nothing of groups of experts: each token's are chosen among all, as llama.cpp does then"
        warnings.warn(f"{read.where}: {older}; convert a model that was trained with groups again", stacklevel=2)


def _experts_in_mxfp4(header: GgufHeader) -> bool:
    """Return whether gpt-oss's experts are all in MXFP4, which its definition reads as they are."""
    kinds = {t.kind for name, t in header.tensors.items() if name.endswith("_exps.weight")}
    return header.metadata["general.architecture"] == "gpt-oss" and kinds == {"MXFP4"}


def _experts(header: GgufHeader, family: Family) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """Return the kind of each stacked weight of experts, and what those in blocks take, in bytes: in 16 bits and here.

    The weights of gpt-oss in MXFP4 are read as they are, and so not among the second.
    """
    kinds, sizes = dict[str, str](), dict[str, tuple[int, int]]()
    for stored, tensor in header.tensors.items():
        name = huggingface_name(stored, family)
        if ".experts." not in name or len(tensor.shape) < 2 or tensor.kind not in KINDS:
            continue
        of_one = stacked_name(name.replace("*", "0").replace("gate_up_proj", "gate_proj"))[0]
        stacked = of_one or name
        if of_one:
            kinds[stacked] = tensor.kind if kinds.get(stacked, tensor.kind) == tensor.kind else "several"
        if KINDS[tensor.kind].block > 1 and not _experts_in_mxfp4(header):
            taken, held = sizes.get(stacked, (0, 0))
            sizes[stacked] = taken + 2 * math.prod(tensor.shape), held + tensor.where.num_bytes
    return kinds, sizes


def _dtype(header: GgufHeader) -> str:
    """Return the dtype of the matrices where they are not quantized, else bfloat16; routers are always in F32."""
    kinds = {t.kind for t in header.tensors.values() if len(t.shape) > 1}
    kinds = kinds - {"F32"} or kinds
    return {"F32": "float32", "F16": "float16"}.get(kinds.pop(), "bfloat16") if len(kinds) == 1 else "bfloat16"


def _longrope(header: GgufHeader, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return Phi-3's scaling: a factor for each speed, of short requests and of long ones."""
    found = [header.tensors.get(name) for name in LONGROPE_FACTORS]
    if found == [None, None]:
        return {}
    if any(t is None or t.kind != "F32" for t in found):
        raise ValueError(f"{header.path}: wanted {' and '.join(LONGROPE_FACTORS)}, both in F32; download it again")
    short, long = (KINDS["F32"].values(t.where.read()).tolist() for t in found if t is not None)
    factor = {"attention_factor": f} if (f := own.get("rope.scaling.attn_factor")) is not None else {}
    return {"rope_type": "longrope", "short_factor": short, "long_factor": long, **factor}


def _rope(header: GgufHeader, own: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """Return the scaling of RoPE in Hugging Face's words.

    Llama 3's stands in a file as the tensor of its effect, one divisor for each speed; all models that were published
    with it have the same frequency factors and original length, which is checked against that tensor.
    """
    scaling = {name: own[f"rope.scaling.{key}"] for key, name in _SCALING.items() if f"rope.scaling.{key}" in own}
    if scaling.get("rope_type") == "none":
        scaling = {}
    if _LOG_MULTIPLIER in own:
        multiplier = Reader(own, str(header.path)).positive(_LOG_MULTIPLIER)
        scaling["mscale"] = scaling["mscale_all_dim"] = round(10 * multiplier, 6)  # of which it is a tenth
    if raw["model_type"] == "gpt_oss" and scaling:
        scaling["truncate"] = False
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
