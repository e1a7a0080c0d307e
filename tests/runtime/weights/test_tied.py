"""A head that differs from the embedding is the head, whatever the configuration says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ENTRIES, draw_tokens
from moe_families import MLA, poisoned_caches
from safetensors.torch import load_file, save_file
from shared_traces import sharing_traces
from step_inputs import Steps, run_schedule, whole
from tiny_models import assert_within_budget, load_tiny, save_tiny

from seamwise import ModelRunner
from seamwise.model_defs import DEFINITIONS
from seamwise.runtime.build.model_config import ModelConfig

SIZES: dict[str, dict[str, Any]] = {
    "DeepseekV2ForCausalLM": MLA,
    "DeepseekV3ForCausalLM": {**MLA, "n_group": 4, "topk_group": 2},
    "GptOssForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "MixtralForCausalLM": {"num_local_experts": 4},
    "Qwen3MoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}


def save_both(directory: Path, architecture: str, *, equal: bool = False, **changes: Any) -> Any:
    """Save a model with a head of its own, or an equal one, and a configuration that says it is tied."""
    theirs = save_tiny(directory, architecture, **{**SIZES.get(architecture, {}), **changes})
    if equal:
        theirs.get_output_embeddings().weight.data.copy_(theirs.get_input_embeddings().weight)
        theirs.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return theirs


def check(directory: Path, entry: str, theirs: Any) -> None:
    model, config = load_tiny(directory, entry)
    requests = draw_tokens(0, 7, 3)
    steps = Steps(requests)
    got = run_schedule(model, steps, whole(requests), poisoned_caches(config, entry, steps))
    assert_within_budget(got, theirs, requests)


traces = sharing_traces()


@pytest.mark.parametrize("architecture", DEFINITIONS)
def test_a_differing_head_is_the_files(architecture: str, tmp_path: Path) -> None:
    theirs = save_both(tmp_path, architecture)
    for entry in ENTRIES:
        check(tmp_path, entry, theirs)


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "GPTNeoXForCausalLM"])
def test_so_it_is_where_head_and_embedding_have_other_names(architecture: str, tmp_path: Path) -> None:
    save_both(tmp_path, architecture)
    assert ModelConfig.from_directory(tmp_path).raw["tie_word_embeddings"] is False


def test_it_is_what_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save_both(tmp_path, "LlamaForCausalLM")
    check(tmp_path, "own", AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_equal_head_is_the_embedding(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = save_both(tmp_path, "LlamaForCausalLM", equal=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    model, _ = load_tiny(tmp_path, "own")
    assert model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]
    check(tmp_path, "own", theirs)


def test_updates_keep_a_tied_head_equal_and_a_differing_one_apart(tmp_path: Path) -> None:
    tied, apart = tmp_path / "tied", tmp_path / "apart"
    save_both(tied, "LlamaForCausalLM", equal=True)
    theirs = save_both(apart, "LlamaForCausalLM")
    weights = load_file(apart / "model.safetensors")
    runner = ModelRunner.load(tied, device="cpu", dtype="float32", pack_dir=None)
    before = [w.clone() for w in runner.executable.weights]
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        runner.update_weights(weights.items())
    assert all(torch.equal(a, b) for a, b in zip(before, runner.executable.weights, strict=True))
    runner.update_weights((weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}).items())
    own = ModelRunner.load(apart, device="cpu", dtype="float32", pack_dir=None)
    own.update_weights({"lm_head.weight": 2 * weights["lm_head.weight"]}.items())
    with torch.no_grad():
        theirs.get_output_embeddings().weight.mul_(2)
    requests = draw_tokens(0, 7, 3)
    steps = Steps(requests, block_size=own.block_size)
    own.allocate_kv(steps.num_blocks)
    from seamwise import StepInput

    got = own.step(StepInput(**steps.next({0: 7, 1: 3}))).logits
    assert_within_budget([got], theirs, requests)
