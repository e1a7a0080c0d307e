"""Any plain causal decoder of transformers runs through its own class; what would be served wrongly is refused."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from step_inputs import Steps, run_schedule
from tiny_models import SIZES, assert_within_budget, load_tiny, save_tiny
from torch import nn

from seamwise.model_defs import build_model
from seamwise.model_defs.hf import _attend, _parameters_on_meta

# Architectures that Seamwise does not define: each has something of its own around causal attention.
DECODERS: dict[str, dict[str, Any]] = {
    "CohereForCausalLM": {"logit_scale": 0.25, "tie_word_embeddings": True},
    "GPT2LMHeadModel": {
        "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 48, "num_key_value_heads": 4,
        "resid_pdrop": 0.1, "attn_pdrop": 0.1,
    },
    "GemmaForCausalLM": {"head_dim": 8},
    "GlmForCausalLM": {"head_dim": 8},
    "Cohere2ForCausalLM": {"head_dim": 8, "sliding_window": 5, "sliding_window_pattern": 2},
    "Glm4ForCausalLM": {"head_dim": 8},
    "GraniteForCausalLM": {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
    "Olmo2ForCausalLM": {},
    "Olmo3ForCausalLM": {"sliding_window": 5, "num_hidden_layers": 4},
    "SmolLM3ForCausalLM": {"num_hidden_layers": 4},
    "Starcoder2ForCausalLM": {"sliding_window": 5},
}  # fmt: skip


@pytest.mark.parametrize("architecture", DECODERS)
def test_chunked_mix_gives_transformers_logits(architecture: str, tmp_path: Path) -> None:
    theirs = save_tiny(tmp_path, architecture, **DECODERS[architecture])
    model, config = load_tiny(tmp_path, "transformers")
    requests = [list(range(3, 22)), [5], list(range(40, 47))]
    steps = Steps(requests, num_padding=1)
    caches = steps.caches(config.num_layers, config.num_kv_heads, config.head_dim, torch.float32)
    got = run_schedule(model, steps, [{0: 6, 2: 3}, {1: 1, 2: 1, 0: 1}, {0: 12, 2: 3}], caches)
    assert_within_budget(got, theirs, requests)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "chunks": ("Qwen3ForCausalLM", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types has .*chunk"),
    "a window in the mask alone": (
        "PhimoeForCausalLM", {"sliding_window": 8}, "layer 0 has sliding_window=None, its configuration wants a",
    ),
    "alibi": ("BloomForCausalLM", {}, "does not use transformers' attention interface"),
    "recurrent": ("MambaForCausalLM", {}, "does not use transformers' attention interface"),
    "encoder": ("BertForMaskedLM", {}, "has no such causal language model"),
    "encoder and decoder": ("T5ForConditionalGeneration", {}, "has no such causal language model"),
    "unheard of": ("NonesuchForCausalLM", {}, "architecture 'NonesuchForCausalLM': transformers .* has no such"),
    "another model's configuration": ("LlamaForCausalLM", {"model_type": "qwen2"}, "model_type is 'qwen2'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_plain_causal_attention_is_refused(case: str) -> None:
    architecture, changes, named = REFUSED[case]
    with pytest.raises(ValueError, match=named):
        model = build_model(architecture, SIZES | changes, entry="transformers")
        model.to_empty(device="cpu")
        steps = Steps([[1, 2, 3]])
        run_schedule(model, steps, [{0: 3}], steps.caches(2, 2, 16, torch.float32))


def test_a_layer_whose_attention_went_elsewhere_is_reported(tmp_path: Path) -> None:
    save_tiny(tmp_path, "LlamaForCausalLM")
    model, _ = load_tiny(tmp_path, "transformers")
    attention: Any = model.get_submodule("model.layers.1.self_attn")
    attention.forward = lambda hidden_states, **_: (hidden_states, None)
    steps = Steps([[1, 2, 3]])
    with pytest.raises(ValueError, match=r"attention of layers \[0\] came .* each of its 2 layers once"):
        run_schedule(model, steps, [{0: 3}], steps.caches(2, 2, 16, torch.float32))


def test_a_cache_of_another_shape_is_reported(tmp_path: Path) -> None:
    save_tiny(tmp_path, "LlamaForCausalLM")
    model, _ = load_tiny(tmp_path, "transformers")
    steps = Steps([[1, 2, 3]])
    with pytest.raises(ValueError, match="layer 0's key has 2 heads of width 16, the KV cache 4 of 16"):
        run_schedule(model, steps, [{0: 3}], steps.caches(2, 4, 16, torch.float32))


def test_a_window_where_the_configuration_has_none_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "Qwen3ForCausalLM", head_dim=16)
    model, _ = load_tiny(tmp_path, "transformers")
    model.get_submodule("model.layers.1.self_attn").sliding_window = 4  # type: ignore[assignment]
    steps = Steps([[1, 2, 3]])
    with pytest.raises(ValueError, match="layer 1 has sliding_window=4, its configuration wants none"):
        run_schedule(model, steps, [{0: 3}], steps.caches(2, 2, 16, torch.float32))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"position_bias": torch.ones(1)}, "position_bias=Tensor"),
        ({"is_causal": False}, "is_causal=False"),
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"new_feature": 3}, "new_feature=3"),
        ({"seamwise_step": None}, "needs a step"),
    ],
)
def test_attention_options_that_change_the_result_are_refused(given: dict[str, Any], named: str) -> None:
    x = torch.ones(1, 2, 3, 8)
    with pytest.raises(ValueError, match=named):
        _attend(nn.Module(), x, x, x, None, **({"seamwise_step": object()} | given))


def test_a_mask_that_a_model_built_itself_is_refused() -> None:
    x = torch.ones(1, 2, 3, 8)
    with pytest.raises(ValueError, match="attention_mask=Tensor is not served"):
        _attend(nn.Module(), x, x, x, torch.ones(3, 3), seamwise_step=object())  # type: ignore[arg-type]


def test_buffers_are_real_and_parameters_are_not() -> None:
    model = build_model("LlamaForCausalLM", SIZES, entry="transformers")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {b.device.type for b in model.buffers()} == {"cpu"}
    assert torch.equal(model.get_buffer("model.rotary_emb.inv_freq")[0], torch.tensor(1.0))


def test_modules_of_other_threads_stay_off_meta() -> None:
    made: list[nn.Module] = []
    with _parameters_on_meta():
        thread = threading.Thread(target=lambda: made.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        assert nn.Linear(2, 2).weight.is_meta
    assert not next(made[0].parameters()).is_meta
    assert not nn.Linear(2, 2).weight.is_meta
