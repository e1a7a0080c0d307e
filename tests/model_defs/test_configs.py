"""Spellings of transformers 4 and 5 mean the same; configurations that the equations do not cover are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import LLAMA3, LOCAL_AND_GLOBAL, YARN
from tiny_models import SIZES

from seamwise.model_defs import build_model
from seamwise.model_defs.blocks import Attention, CausalLM, RopeTable
from seamwise.model_defs.hf_config import Reader
from seamwise.model_defs.rope import Rope

LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 64}

PHI3 = {"original_max_position_embeddings": 64}  # its class has a default, which counts before the rope's own
SLIDING = {"sliding_window": 9, "use_sliding_window": True}


def read(E: int, **raw: Any) -> Rope:
    return Rope.from_hf(Reader(raw, "test"), E)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 12345.0},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
        LLAMA3,
        YARN,
        YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        YARN | {"mscale": 0.7, "mscale_all_dim": 0.9, "factor": 40.0},
        YARN | {"attention_factor": 0.8},
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        LONGROPE | {"rope_theta": 1e4, "long": 4.0, "partial_rotary_factor": 0.75},
        LONGROPE | {"rope_theta": 1e4, "long": 4.0, "factor": 16.0, "attention_factor": 1.3},
    ],
)
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_speeds_equal_transformers_bit_for_bit(rope: dict[str, Any], head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    if "long" in rope:
        pairs = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
        rope = {k: v for k, v in rope.items() if k != "long"}
        rope |= {"short_factor": [1.0 + i / 7 for i in range(pairs)], "long_factor": [2.0 + i for i in range(pairs)]}
    config = LlamaConfig(head_dim=head_dim, rope_parameters=dict(rope), max_position_embeddings=2048)
    for longest in (64, 65, 2048, 4096):
        make = ROPE_INIT_FUNCTIONS.get(rope["rope_type"], LlamaRotaryEmbedding.compute_default_rope_parameters)
        speeds, scaling = make(config, device="cpu", seq_len=longest)
        ours = read(head_dim, rope_parameters=rope, max_position_embeddings=2048, max_model_len=longest)
        assert torch.equal(RopeTable(ours).speeds_F, speeds)
        assert ours.scaling == scaling


def test_old_and_new_rope_spelling_are_one() -> None:
    new = read(64, rope_parameters=LLAMA3)
    scaling = {k: v for k, v in LLAMA3.items() if k not in ("rope_theta", "original_max_position_embeddings")}
    assert read(64, max_position_embeddings=64, rope_theta=500000.0, rope_scaling=scaling) == new
    scaling["type"] = scaling.pop("rope_type")
    assert read(64, max_position_embeddings=64, rope_theta=5e5, rope_scaling=scaling) == new
    tables = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    lengths = {"max_position_embeddings": 128, "original_max_position_embeddings": 32}
    long = read(8, **lengths, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **tables})
    assert read(8, **lengths, rope_theta=1e4, rope_scaling={"type": "su", **tables}) == long


def ropes_and_windows(architecture: str, **raw: Any) -> list[tuple[tuple[float, ...], int]]:
    model = build_model(architecture, SIZES | {"head_dim": 8, "num_hidden_layers": 7, **raw}, entry="own")
    assert isinstance(model, CausalLM)
    windows = [m.window for m in model.modules() if isinstance(m, Attention)]
    speeds = [tuple(table.speeds_F.tolist()) for table in model.model.tables]
    return [(speeds[i], w) for i, w in zip(model.model.table_of_layer, windows, strict=True)]


def test_gemma3_of_transformers_4_and_5_are_one() -> None:
    new = ropes_and_windows("Gemma3ForCausalLM", sliding_window=4, rope_parameters=LOCAL_AND_GLOBAL)
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = {"rope_theta": 1e4, "rope_local_base_freq": 100.0, "rope_scaling": scaling, "sliding_window_pattern": 6}
    assert ropes_and_windows("Gemma3ForCausalLM", sliding_window=4, **old) == new
    assert [window for _, window in new] == [4, 4, 4, 4, 4, 0, 4]
    assert len({speeds for speeds, window in new if window}) == len({speeds for speeds, window in new if not window})
    assert new[0][0] != new[5][0]


@pytest.mark.parametrize(
    ("architecture", "raw", "windows"),
    [
        ("MistralForCausalLM", {}, [4096] * 7),
        ("MistralForCausalLM", {"sliding_window": None}, [0] * 7),
        ("Qwen2ForCausalLM", {**SLIDING, "use_sliding_window": False}, [0] * 7),
        ("Qwen2ForCausalLM", {**SLIDING, "max_window_layers": 5}, [0] * 5 + [9] * 2),
        ("Qwen2ForCausalLM", {**SLIDING, "max_window_layers": 0}, [9] * 7),
        ("Gemma2ForCausalLM", {"sliding_window": 9}, [9, 0, 9, 0, 9, 0, 9]),
    ],
)  # fmt: skip
def test_windows_of_configurations_without_layer_types(
    architecture: str, raw: dict[str, Any], windows: list[int]
) -> None:
    assert [window for _, window in ropes_and_windows(architecture, **raw)] == windows


@pytest.mark.parametrize(
    ("architecture", "change", "named"),
    [
        ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "ntk", "factor": 4.0}}, "rope_type is 'ntk'"),
        ("LlamaForCausalLM", {"rope_parameters": LLAMA3 | {"factor": None}}, "factor is missing"),
        ("LlamaForCausalLM", {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "factor 4.0 is not below"),
        ("LlamaForCausalLM", {"rope_parameters": [1]}, "rope_parameters is"),
        ("LlamaForCausalLM", {"rope_theta": -1}, "rope_theta is -1"),
        ("LlamaForCausalLM", {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        ("LlamaForCausalLM", {"hidden_act": "tanh"}, "hidden_act is 'tanh'"),
        ("LlamaForCausalLM", {"intermediate_size": None}, "intermediate_size is missing"),
        ("LlamaForCausalLM", {"intermediate_size": "48"}, "intermediate_size is '48'"),
        ("LlamaForCausalLM", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ("LlamaForCausalLM", {"attention_bias": "yes"}, "attention_bias is 'yes'"),
        ("LlamaForCausalLM", {"head_dim": 7}, "head_dim is 7"),
        ("MistralForCausalLM", {"sliding_window": 0}, "sliding_window is 0"),
        ("Qwen2ForCausalLM", {"layer_types": ["full_attention"]}, "wanted a list of 2 of 'full_attention' and"),
        ("Qwen2ForCausalLM", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types is .*chunked"),
        ("Phi3ForCausalLM", {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5, wanted at most 1"),
        (
            "Phi3ForCausalLM", PHI3 | {"rope_scaling": LONGROPE | {"short_factor": [1.0]}},
            "short_factor is 1 numbers, .* of 8",
        ),
        (
            "Phi3ForCausalLM", PHI3 | {"rope_scaling": LONGROPE | {"short_factor": [1, 2, 0, 4, 5, 6, 7, 8]}},
            "short_factor is 0",
        ),
        ("Gemma2ForCausalLM", {"head_dim": 8, "hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ("Gemma2ForCausalLM", {"head_dim": 8, "final_logit_softcapping": -1.0}, "final_logit_softcapping is -1.0"),
        ("Gemma3ForCausalLM", {"head_dim": 8, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("Gemma3ForCausalLM", {"head_dim": 8, "use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)  # fmt: skip
def test_configurations_outside_the_equations_are_refused(
    architecture: str, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        build_model(architecture, SIZES | change, entry="own")


def test_unknown_entry_and_architecture_are_refused() -> None:
    with pytest.raises(ValueError, match="entry='vllm': wanted"):
        build_model("LlamaForCausalLM", SIZES, entry="vllm")
    with pytest.raises(ValueError, match=r"Seamwise defines .*LlamaForCausalLM.*; use entry='transformers'"):
        build_model("GPT2LMHeadModel", SIZES, entry="own")


def test_a_head_may_turn_in_part_in_every_family() -> None:
    whole = read(16, rope_theta=1e4)
    part = read(16, rope_theta=1e4, partial_rotary_factor=0.5)
    assert part.speeds == read(8, rope_theta=1e4).speeds and len(whole.speeds) == 8
    model = build_model("LlamaForCausalLM", SIZES | {"partial_rotary_factor": 0.5}, entry="own")
    assert model.model.tables[0].speeds_F.tolist() == list(part.speeds)  # type: ignore[union-attr,index]
