"""The text of multimodal checkpoints, as save_pretrained writes them and under the names they were published with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import draw_tokens
from moe_families import poisoned_caches
from safetensors.torch import load_file, save_file
from step_inputs import Steps, run_schedule
from tiny_models import assert_within_budget, load_tiny

from seamwise.runtime.build.model_config import ModelConfig

TEXT = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
QWEN = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 32}
QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "Gemma3ForConditionalGeneration": (
        {"sliding_window": 4}, {**SMALL, "image_size": 28, "patch_size": 14}, "Gemma3ForCausalLM"
    ),
    "Mistral3ForConditionalGeneration": (
        {"model_type": "mistral", "tie_word_embeddings": False},
        {**SMALL, "model_type": "pixtral", "image_size": 28, "patch_size": 14, "head_dim": 16}, "MistralForCausalLM",
    ),
    "Qwen2VLForConditionalGeneration": (
        {"rope_parameters": QWEN_ROPE}, {**QWEN, "embed_dim": 32, "mlp_ratio": 1, "hidden_size": 64},
        "Qwen2ForCausalLM",
    ),
    "Qwen2_5_VLForConditionalGeneration": ({"rope_parameters": QWEN_ROPE}, QWEN, "Qwen2ForCausalLM"),
    "Qwen3VLForConditionalGeneration": ({"rope_parameters": QWEN_ROPE}, QWEN, "Qwen3ForCausalLM"),
}  # fmt: skip
LLAVA = [(r"^model\.language_model\.", "language_model.model."), (r"^lm_head", "language_model.lm_head")]
QWEN_VL = [(r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")]
PUBLISHED = {
    "Gemma3ForConditionalGeneration": LLAVA,
    "Mistral3ForConditionalGeneration": LLAVA,
    "Qwen2VLForConditionalGeneration": QWEN_VL,
    "Qwen2_5_VLForConditionalGeneration": QWEN_VL,
}


def save(directory: Path, architecture: str) -> Any:
    """Save a tiny multimodal model of transformers and return it."""
    import transformers

    model_class = getattr(transformers, architecture)
    text, vision, _ = MODELS[architecture]
    if "Qwen2" in architecture:
        text = {**text, **{k: v for k, v in TEXT.items() if k != "head_dim"}}
    config = model_class.config_class(text_config={**TEXT, **text}, vision_config=vision)
    if "Qwen2" in architecture:
        config.text_config.head_dim = 16
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else parameter + 0.2 * noise)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("published", [False, True], ids=["as saved", "as published"])
@pytest.mark.parametrize("architecture", MODELS)
def test_text_alone_gives_transformers_logits(architecture: str, published: bool, tmp_path: Path) -> None:
    theirs = save(tmp_path, architecture)
    if published:
        tensors = load_file(tmp_path / "model.safetensors")
        for old, new in PUBLISHED.get(architecture, []):
            tensors = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model, config = load_tiny(tmp_path, "own")
    assert config.architecture == MODELS[architecture][2]
    requests = draw_tokens(0, 9, 3)
    steps = Steps(requests)
    got = run_schedule(model, steps, [{0: 5, 1: 3}, {0: 4}], poisoned_caches(config, "own", steps))
    assert_within_budget(got, theirs, requests)


def test_text_of_another_kind_is_named(tmp_path: Path) -> None:
    raw = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": {"model_type": "bert"}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"text_config\.model_type is 'bert', wanted one of mistral, ministral3"):
        ModelConfig.from_directory(tmp_path)
