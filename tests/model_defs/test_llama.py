"""Llama's equations give transformers' logits, however its tokens are batched."""

from __future__ import annotations

import copy
import random
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_inputs import Steps, run_schedule, whole
from tiny_models import SIZES, assert_within_budget, load_tiny, reference, save_tiny

from seamwise.model_defs import build_model
from seamwise.model_defs.hf_config import Reader
from seamwise.model_defs.llama import LlamaConfig
from seamwise.model_defs.rope import Rope

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "tied, wide heads": {"tie_word_embeddings": True, "head_dim": 12, "num_key_value_heads": 1},
    "biases, llama3 rope": {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
}
ENTRIES = ("own", "transformers")


@cache
def tiny(variant: str) -> tuple[Any, dict[str, Any], Any]:
    """Return transformers' model of a variant, our modules by entry, and the configuration."""
    directory = Path(mkdtemp())
    theirs = save_tiny(directory, "LlamaForCausalLM", **VARIANTS[variant])
    loaded = {entry: load_tiny(directory, entry) for entry in ENTRIES}
    return theirs, {e: m for e, (m, _) in loaded.items()}, loaded["own"][1]


def run(variant: str, entry: str, requests: list[list[int]], schedule: list[dict[int, int]], **options: Any) -> list:
    _, ours, config = tiny(variant)
    steps = Steps(requests, **options)
    caches = steps.caches(config.num_layers, config.num_kv_heads, config.head_dim, torch.float32)
    return run_schedule(ours[entry], steps, schedule, caches)


def check(variant: str, entry: str, requests: list[list[int]], schedule: list[dict[int, int]], **options: Any) -> None:
    assert_within_budget(
        run(variant, entry, requests, schedule, **options), copy.deepcopy(tiny(variant)[0]), requests
    )


def draw_tokens(seed: int, *lengths: int) -> list[list[int]]:
    choose = random.Random(seed)
    return [[choose.randrange(SIZES["vocab_size"]) for _ in range(n)] for n in lengths]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_decode_and_chunked_mix(variant: str, entry: str) -> None:
    requests = draw_tokens(0, 19, 1, 7, 80)
    check(variant, entry, requests, whole(requests))
    check(variant, entry, requests[2:3], [{0: 1}] * 7)
    mix = [{0: 5, 3: 16}, {1: 1, 3: 1, 0: 1, 2: 3}, {2: 1, 0: 13, 3: 1}, {3: 62, 2: 3}]
    check(variant, entry, requests, mix, block_size=16)


@st.composite
def mixes(draw: st.DrawFn) -> tuple[list[list[int]], list[dict[int, int]]]:
    requests = draw_tokens(draw(st.integers(0, 9)), *draw(st.lists(st.integers(1, 24), min_size=1, max_size=5)))
    left = {r: len(tokens) for r, tokens in enumerate(requests)}
    schedule = []
    while left:
        chosen = draw(st.lists(st.sampled_from(sorted(left)), min_size=1, unique=True))
        step = {r: draw(st.integers(1, left[r])) for r in chosen}
        left = {r: n - step.get(r, 0) for r, n in left.items() if n > step.get(r, 0)}
        schedule.append(step)
    return requests, schedule


@settings(max_examples=40, deadline=None)
@given(
    mix=mixes(), variant=st.sampled_from(sorted(VARIANTS)), entry=st.sampled_from(ENTRIES),
    block_size=st.sampled_from([1, 4, 16]), num_padding=st.integers(0, 3), seed=st.integers(0, 3),
)  # fmt: skip
def test_any_batch_composition(
    mix: Any, variant: str, entry: str, block_size: int, num_padding: int, seed: int
) -> None:
    requests, schedule = mix
    check(variant, entry, requests, schedule, block_size=block_size, num_padding=num_padding, seed=seed)


@pytest.mark.parametrize("entry", ENTRIES)
def test_only_wanted_rows_give_logits(entry: str) -> None:
    requests = draw_tokens(1, 6, 4)
    every = torch.cat(run("grouped", entry, requests, whole(requests)))
    _, ours, config = tiny("grouped")
    steps = Steps(requests)
    step = steps.next(whole(requests)[0]) | {"logit_rows": torch.tensor([9, 0, 5])}
    caches = steps.caches(config.num_layers, config.num_kv_heads, config.head_dim, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours[entry](kv_caches=caches, **step), every[[9, 0, 5]])


def test_both_entries_have_the_checkpoints_parameter_names() -> None:
    theirs, ours, _ = tiny("biases, llama3 rope")
    wanted = {name: p.shape for name, p in theirs.named_parameters()}
    for entry in ENTRIES:
        assert {name: p.shape for name, p in ours[entry].named_parameters()} == wanted


def test_tied_embeddings_are_one_parameter() -> None:
    _, ours, _ = tiny("tied, wide heads")
    for entry in ENTRIES:
        assert ours[entry].lm_head.weight is ours[entry].model.embed_tokens.weight


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 12345.0}, LLAMA3])
def test_rotation_speeds_equal_transformers_bit_for_bit(rope: dict[str, Any]) -> None:
    from transformers import LlamaConfig as Theirs
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for head_dim in (8, 64, 128):
        theirs = LlamaRotaryEmbedding(Theirs(head_dim=head_dim, rope_parameters=dict(rope))).inv_freq
        assert torch.equal(Rope.from_hf(Reader({"rope_parameters": rope}, "test")).speeds(head_dim), theirs)


def test_old_and_new_rope_spelling_are_one() -> None:
    new = LlamaConfig.from_hf(SIZES | {"rope_parameters": LLAMA3})
    scaling = {k: v for k, v in LLAMA3.items() if k not in ("rope_theta", "original_max_position_embeddings")}
    old = LlamaConfig.from_hf(SIZES | {"max_position_embeddings": 64, "rope_theta": 500000.0, "rope_scaling": scaling})
    assert old == new
    scaling["type"] = scaling.pop("rope_type")
    oldest = SIZES | {"max_position_embeddings": 64, "rope_theta": 5e5, "rope_scaling": scaling}
    assert LlamaConfig.from_hf(oldest) == new


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type is 'linear'"),
        ({"rope_parameters": LLAMA3 | {"factor": None}}, "factor is missing"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor 4.0 is not below"),
        ({"rope_parameters": [1]}, "rope_parameters is"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
        ({"intermediate_size": "48"}, "intermediate_size is '48'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes'"),
        ({"head_dim": 7}, "head_dim is 7"),
    ],
)
def test_configurations_outside_the_equations_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build_model("LlamaForCausalLM", SIZES | change, entry="own")


def test_unknown_entry_and_architecture_are_refused() -> None:
    with pytest.raises(ValueError, match="entry='vllm': wanted"):
        build_model("LlamaForCausalLM", SIZES, entry="vllm")
    with pytest.raises(ValueError, match="Seamwise defines LlamaForCausalLM; use entry='transformers'"):
        build_model("GPT2LMHeadModel", SIZES, entry="own")


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_real_model_gives_transformers_logits(entry: str) -> None:
    from transformers import AutoModelForCausalLM

    from seamwise.bench.demo_model import DEFAULT_CACHE, NAME

    directory = DEFAULT_CACHE / NAME
    if not (directory / "config.json").exists():
        pytest.skip(f"{directory} is not there; `python -m seamwise.bench.demo_model` makes it")
    model, config = load_tiny(directory, entry)
    requests = [[504, 3575, 282, 4649, 314], list(range(100, 140)), [7]]
    steps = Steps(requests, block_size=16)
    caches = steps.caches(config.num_layers, config.num_kv_heads, config.head_dim, torch.float32)
    got = run_schedule(model, steps, [{1: 17, 0: 4}, {0: 1, 1: 1, 2: 1}, {1: 22}], caches)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    assert_within_budget(got, theirs, requests)
    assert [g.argmax(-1).tolist() for g in got] == [e.argmax(-1).tolist() for e in reference(theirs, requests)]
