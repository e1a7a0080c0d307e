"""Any plain causal decoder of transformers runs through its own class; what would be served wrongly is refused."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from older_transformers import OLDER
from step_inputs import Steps, run_schedule
from tiny_models import SIZES, assert_within_budget, load_tiny, save_tiny
from torch import nn

from seamwise.model_defs import build_model
from seamwise.model_defs.hf import _parameters_on_meta
from seamwise.model_defs.hf_attention import Attending, Step, attend, make_mask
from seamwise.model_defs.hf_masks import Mask
from seamwise.model_defs.hf_scores import is_square

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
    # Not by the names of config.json: heads, and windows that only their masks have.
    "GPTNeoXForCausalLM": {"rotary_pct": 0.5},
    "OPTForCausalLM": {"ffn_dim": 48, "word_embed_proj_dim": 64},
    "PhimoeForCausalLM": {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "StableLmForCausalLM": {},  # does not say that it uses the attention interface
    "GraniteMoeForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    # Attention spelled out, ALiBi, tables of positions, positions counted otherwise, an indexer that may choose all.
    "BloomForCausalLM": {"n_head": 4, "n_layer": 2},
    "MptForCausalLM": {"d_model": 64, "n_heads": 4, "n_layers": 2},
    "FalconForCausalLM": {},
    "FalconForCausalLM, ALiBi in its mask": {"alibi": True, "multi_query": False, "parallel_attn": False},
    "GPTJForCausalLM": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 8},
    "GPTNeoForCausalLM": {
        "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 5,
    },
    "RobertaForCausalLM": {"is_decoder": True},
    "RoFormerForCausalLM": {"is_decoder": True},
    "BartForCausalLM": {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    "BioGptForCausalLM": {},
    "NanoChatForCausalLM": {},
    "DiffLlamaForCausalLM": {},
    "DeepseekV32ForCausalLM": {
        "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "moe_intermediate_size": 24, "first_k_dense_replace": 1,
    },
}  # fmt: skip


REFUSED_BEFORE_5_23 = {
    "OPTForCausalLM": "this version's class makes a dense mask of its own, which is refused",
    "RoFormerForCausalLM": "this version's class attends to later tokens, which is refused",
}


@pytest.mark.parametrize("architecture", DECODERS)
def test_chunked_mix_gives_transformers_logits(architecture: str, tmp_path: Path) -> None:
    if OLDER and architecture in REFUSED_BEFORE_5_23:
        pytest.skip(REFUSED_BEFORE_5_23[architecture])
    theirs = save_tiny(tmp_path, architecture.partition(",")[0], **DECODERS[architecture])
    if "ALiBi" in architecture:  # which its eager attention adds twice
        theirs = type(theirs).from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    model, _ = load_tiny(tmp_path, "transformers")
    requests = [list(range(3, 22)), [5], list(range(40, 47))]
    steps = Steps(requests, num_padding=1)
    got = run_schedule(model, steps, [{0: 6, 2: 3}, {1: 1, 2: 1, 0: 1}, {0: 12, 2: 3}], steps.caches_of(model))
    assert_within_budget(got, theirs, requests)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a state beside keys and values": ("MambaForCausalLM", {}, "its layers of linear_attention are not served"),
    "a state without layers": ("RwkvForCausalLM", {}, "it keeps a state for each request"),
    "positions of its own": ("CpmAntForCausalLM", {"dim_ff": 48}, "its forward takes no position_ids"),
    "a configuration without lengths": ("XLNetLMHeadModel", {}, "refuses its configuration: The model xlnet"),
    "later tokens": ("BertLMHeadModel", {}, "is_causal=False is not served"),
    "a table of its own attentions": ("GitForCausalLM", {}, "takes no other attention than its own, by name"),
    "a bias of its own": ("DogeForCausalLM", {}, "the model's own code computes with its mask"),
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
        for tensor in model.to_empty(device="cpu").state_dict().values():
            tensor.zero_()
        for buffer in model.buffers():
            buffer.zero_()
        steps = Steps([[1, 2, 3]])
        run_schedule(model, steps, [{0: 3}], steps.caches(2, 2, 16, torch.float32))


def test_a_layer_whose_attention_went_elsewhere_is_reported(tmp_path: Path) -> None:
    save_tiny(tmp_path, "LlamaForCausalLM")
    model, _ = load_tiny(tmp_path, "transformers")
    attention: Any = model.get_submodule("model.layers.1.self_attn")
    attention.forward = lambda hidden_states, **_: (hidden_states, None)
    steps = Steps([[1, 2, 3]])
    with pytest.raises(ValueError, match=r"attention came 1 times .* wanted 2, once for each KV cache"):
        run_schedule(model, steps, [{0: 3}], steps.caches(2, 2, 16, torch.float32))


def test_a_cache_of_another_shape_is_reported(tmp_path: Path) -> None:
    save_tiny(tmp_path, "LlamaForCausalLM")
    model, _ = load_tiny(tmp_path, "transformers")
    steps = Steps([[1, 2, 3]])
    with pytest.raises(ValueError, match="call 0's key has 2 heads of width 16, the KV cache 4 of 16"):
        run_schedule(model, steps, [{0: 3}], steps.caches(2, 4, 16, torch.float32))


def test_a_window_where_the_configuration_has_none_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "Qwen3ForCausalLM", head_dim=16)
    model, _ = load_tiny(tmp_path, "transformers")
    model.get_submodule("model.layers.1.self_attn").sliding_window = 4  # type: ignore[assignment]
    steps = Steps([[1, 2, 3]])
    with pytest.raises(ValueError, match="call 1 of attention has sliding_window=4, its mask none"):
        run_schedule(model, steps, [{0: 3}], steps.caches(2, 2, 16, torch.float32))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"position_bias": torch.ones(1)}, "position_bias=Tensor"),
        ({"is_causal": False}, "is_causal=False"),
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"new_feature": 3}, "new_feature=3"),
    ],
)
def test_attention_options_that_change_the_result_are_refused(given: dict[str, Any], named: str) -> None:
    x = torch.ones(1, 2, 3, 8)
    with pytest.raises(ValueError, match=named), Attending(a_step()):
        attend(nn.Module(), x, x, x, None, **given)


def a_step(longest: int = 64) -> Step:
    nothing = torch.zeros(1, dtype=torch.int64)
    return Step(kv_caches=None, slot_mapping=nothing, spans=(nothing,) * 3, longest=longest, tokens=3)


def test_attention_outside_of_a_step_is_refused() -> None:
    x = torch.ones(1, 2, 3, 8)
    with pytest.raises(ValueError, match="needs a step"):
        attend(nn.Module(), x, x, x, None)


def test_a_mask_that_a_model_built_itself_is_refused() -> None:
    x = torch.ones(1, 2, 3, 8)
    with pytest.raises(ValueError, match="attention_mask=Tensor is not served"), Attending(a_step()):
        attend(nn.Module(), x, x, x, torch.ones(3, 3))
    with pytest.raises(ValueError, match="a mask of its own, or dropout"), Attending(a_step()):
        torch.nn.functional.scaled_dot_product_attention(x, x, x, torch.ones(3, 3))


def test_masks_are_read_by_what_they_are_put_together_of() -> None:
    from transformers import masking_utils as masks

    left, ids = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)
    window = masks.sliding_window_causal_mask_function(5)
    if hasattr(masks, "packed_sequence_compatibility_function"):
        packed = masks.packed_sequence_compatibility_function(window, ids, ids)
    else:  # as transformers 5.17 puts it together
        packed = masks.and_masks(window, masks.packed_sequence_mask_function(ids))
    for function, wanted in (
        (masks.causal_mask_function, Mask(0)),
        (window, Mask(5)),
        (packed, Mask(5)),
        (masks.chunked_causal_mask_function(64, left), Mask(0)),  # no request is longer
        (masks.chunked_causal_mask_function(63, left), Mask(-63)),
    ):
        with Attending(a_step()):
            assert make_mask(mask_function=function) == wanted
    for function, named in (
        (
            masks.and_masks(window, masks.chunked_causal_mask_function(63, left)),
            "attention in chunks and windows at once is not served; pass max_model_len=63",
        ),
        (masks.bidirectional_mask_function, "a mask by bidirectional_mask_function is not served"),
        (masks.and_masks(window, masks.blockwise_overlay(ids)), "a mask by blockwise_overlay.* is not served"),
        (masks.or_masks(window, masks.causal_mask_function), "a mask by or_masks.* is not served"),
        (masks.sliding_window_overlay(3), "attention to later tokens is not served"),
    ):
        with Attending(a_step()):
            asked_for = make_mask(mask_function=function)  # which a model may do, and not use it
        with pytest.raises(ValueError, match=named):
            asked_for.applied()
    with pytest.raises(ValueError, match="a mask of Tensor is not served"), Attending(a_step()):
        make_mask(mask_function=window, attention_mask=ids)


def test_what_calls_dot_product_attention_elsewhere_gets_torchs() -> None:
    import torch.nn.functional as F

    x, found = torch.randn(1, 2, 3, 8), []
    with Attending(a_step()):
        thread = threading.Thread(target=lambda: found.append(F.scaled_dot_product_attention(x, x, x)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], F.scaled_dot_product_attention(x, x, x))


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


def test_frequencies_times_positions_are_no_scores() -> None:
    """transformers 5.17 multiplies rotary frequencies (1, 4, 1) with positions (1, 1, T) by @, and T may be 4."""
    assert not is_square(torch.ones(1, 4, 1), torch.ones(1, 1, 4), 4)
    assert is_square(torch.ones(1, 4, 8), torch.ones(1, 8, 4), 4)
