"""One decoder of transformers, tiny and random, beside itself.

Its configuration is made small, saved by save_pretrained with random weights, loaded through entry="transformers" and
run in chunks beside other requests; its logits are compared with those of transformers' own class.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Sizes by the names that configurations have for them; a class gets those that it knows. What changes with the position
# (windows, chunks, scales of queries, RoPE's original length) changes within the requests below.
TINY: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "d_model": 64, "n_embd": 64, "emb_dim": 64, "intermediate_size": 48,
    "ffn_dim": 48, "n_inner": 48, "ffn_hidden_size": 48, "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2,
    "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4,
    "num_heads": 4, "decoder_attention_heads": 4, "encoder_attention_heads": 4, "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48, "attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rotary_dim": 8,
    "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256, "max_seq_len": 256, "pad_token_id": 0,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "moe_num_experts": 4, "moe_k": 2,
    "num_experts_per_token": 2, "n_shared_experts": 1, "moe_num_shared_experts": 1, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1, "kv_lora_rank": 32, "q_lora_rank": 24, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "sliding_window": 8, "attention_chunk_size": 8, "local_attention": 8,
    "floor_scale": 4, "word_embed_proj_dim": 64,
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 97, "global_head_dim": 32, "kv_channels": 16, "lora_rank": 8,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# What some classes want beside: sizes that hang together, lists with an entry for each layer.
_LATENT: dict[str, Any] = {"num_key_value_heads": 4}  # keys and values of latents have a head for each query
_DECODER: dict[str, Any] = {"is_decoder": True}  # else these look ahead
EXTRA: dict[str, dict[str, Any]] = {
    "CohereCompassForCausalLM": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in (
            "sliding_attention", "full_attention"
        )},
    },
    "Gemma3nForCausalLM": {"num_kv_shared_layers": 0},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["full_attention"] * 2},
    "Lfm2MoeForCausalLM": {"layer_types": ["full_attention"] * 2, "num_dense_layers": 1},
    "DbrxForCausalLM": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 48},
    },
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "XmodForCausalLM": _DECODER | {"default_language": "en_XX"},
    "BigBirdForCausalLM": _DECODER | {"attention_type": "original_full"},
    "LongcatFlashForCausalLM": {"qk_head_dim": 24, "head_dim": 8} | _LATENT,
    "YoutuForCausalLM": _LATENT | {"head_dim": 8},
}  # fmt: skip
EXTRA |= dict.fromkeys((
    "AXK1ForCausalLM", "AXK2ForCausalLM", "DeepseekV32ForCausalLM", "Dots3NoteForCausalLM",
    "Glm4MoeLiteForCausalLM", "GlmMoeDsaForCausalLM", "MiniCPM3ForCausalLM",
), _LATENT)  # fmt: skip
EXTRA |= dict.fromkeys((
    "BertLMHeadModel", "BertGenerationDecoder", "CamembertForCausalLM", "Data2VecTextForCausalLM",
    "ElectraForCausalLM", "ErnieForCausalLM", "MegatronBertForCausalLM", "RemBertForCausalLM",
    "RoCBertForCausalLM", "RobertaForCausalLM", "RobertaPreLayerNormForCausalLM", "RoFormerForCausalLM",
    "XLMRobertaForCausalLM", "XLMRobertaXLForCausalLM",
), _DECODER)  # fmt: skip
REQUESTS = [[5, 77, 3, 18, 44, 9, 60, 61, 62, 10, 11, 71, 33], [7, 8, 90]]
CHUNKS = ({0: 6, 1: 1}, {0: 2, 1: 1}, {0: 4, 1: 1}, {0: 1})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a model fared: "runs", "refused" with what was said, "wrong" with the error and its budget."""

    architecture: str
    verdict: str
    reason: str = ""


def architectures() -> list[str]:
    """Return the causal language models of transformers that Seamwise does not define, once each."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from seamwise.model_defs import has_definition

    return [name for name in dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) if not has_definition(name)]


def tiny_model(architecture: str, directory: Path) -> Any:
    """Save a tiny random model of a class of transformers and return it."""
    import transformers

    model_class = getattr(transformers, architecture)
    config = tiny_config(model_class.config_class, EXTRA.get(architecture, {}))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else parameter + 0.2 * noise)
    model.save_pretrained(directory)
    return model


def tiny_config(config_class: Any, extra: dict[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(config_class)} | {*config_class.attribute_map}
    sizes = {name: value for name, value in TINY.items() if name in known}
    if "text_config" in known and "text_config" not in extra:
        inner = config_class.sub_configs.get("text_config")
        if isinstance(inner, type) and hasattr(inner, "model_type") and inner.model_type:
            sizes["text_config"] = tiny_config(inner, {}).to_dict()
    rope = getattr(config_class(**{**sizes, **extra}), "rope_parameters", None)
    if isinstance(rope, dict) and "original_max_position_embeddings" in rope:
        extra = {"rope_parameters": rope | {"original_max_position_embeddings": 8}, **extra}
    return config_class(**{**sizes, **extra})


def try_model(architecture: str) -> Outcome:
    """Make a tiny model, run it by both, and say how it went."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            theirs = tiny_model(architecture, Path(directory))
            exact = [r.double() for r in reference(theirs)]
        except Exception as error:
            return Outcome(architecture=architecture, verdict="no tiny model", reason=_said(error))
        try:
            got = run(Path(directory))
        except Exception as error:
            return Outcome(architecture=architecture, verdict="refused", reason=_said(error))
    off = max((a.double() - b).abs().max().item() for a, b in zip(got, exact, strict=True))
    scale = max(b.abs().max().item() for b in exact)
    if not off <= 1e-4 * max(scale, 1.0):
        return Outcome(architecture=architecture, verdict="wrong", reason=f"error {off:.1e} of logits to {scale:.1f}")
    return Outcome(architecture=architecture, verdict="runs", reason=f"error {off:.1e}")


def reference(model: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(torch.tensor([tokens]), use_cache=False).logits[0] for tokens in REQUESTS]


def run(directory: Path) -> list[torch.Tensor]:
    """Return the logits of the requests, in chunks mixed with each other, from a loaded runner."""
    from seamwise import ModelRunner

    runner = ModelRunner.load(
        directory, device="cpu", dtype="float32", entry="transformers", pack_dir=None,
        disable_hybrid_kv_cache_manager=True,
    )  # fmt: skip
    runner.allocate_kv(8)
    return _stepped(lambda step: runner.step(step).logits.clone(), runner.block_size)


def _stepped(step: Any, block_size: int) -> list[torch.Tensor]:
    from seamwise.runtime.build.step import ragged_step

    blocks = -(-max(map(len, REQUESTS)) // block_size)
    tables = np.array([[1 + r * blocks + i for i in range(blocks)] for r in range(len(REQUESTS))], dtype=np.int32)
    done = [0] * len(REQUESTS)
    rows: list[list[torch.Tensor]] = [[] for _ in REQUESTS]
    for chunk in CHUNKS:
        chosen = [*chunk]
        firsts, counts = np.array([done[r] for r in chosen]), np.array([chunk[r] for r in chosen])
        tokens = np.array([t for r in chosen for t in REQUESTS[r][done[r] : done[r] + chunk[r]]])
        every = np.arange(len(tokens))
        logits = step(ragged_step(tokens, tables[chosen], firsts, counts, block_size, every))
        for r, part in zip(chosen, logits.split(counts.tolist()), strict=True):
            rows[r].append(part)
            done[r] += len(part)
    return [torch.cat(parts) for parts in rows]


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
