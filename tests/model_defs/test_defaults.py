"""A config.json that holds only what differs from transformers' defaults means the same; no default is read wrongly."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from families import draw_tokens
from moe_families import poisoned_caches
from older_transformers import OLDER
from step_inputs import Steps, run_schedule
from tiny_models import SIZES, assert_within_budget, load_tiny, save_tiny

from seamwise.model_defs import DEFINITIONS
from seamwise.model_defs.hf_config import OLDER_NAMES
from seamwise.model_defs.hf_defaults import DEFAULTS, completed
from seamwise.runtime.build.model_config import ModelConfig

# All that keeps a model of default sizes tiny; what is not here is transformers' default.
SMALL = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
MLA = {"moe_intermediate_size": 24, "kv_lora_rank": 32, "q_lora_rank": 24, "num_attention_heads": 4}
NON_DEFAULT: dict[str, dict[str, Any]] = {
    "DeepseekV2ForCausalLM": {**MLA, "num_experts_per_tok": 3},
    "DeepseekV3ForCausalLM": {**MLA, "num_key_value_heads": 4, "first_k_dense_replace": 1},
}


def classes_config(architecture: str) -> Any:
    import transformers

    return getattr(transformers, architecture).config_class


def meant(architecture: str, name: str) -> Any:
    """Return the value of a class's own default; ... where the class has no such key."""
    config_class = classes_config(architecture)
    for known in (name, *OLDER_NAMES.get(name, ())):
        fields = {f.name: f for f in dataclasses.fields(config_class)}
        if known in fields:
            return fields[known].default
    return ...


@pytest.mark.parametrize("architecture", DEFAULTS)
def test_every_default_is_the_classes(architecture: str) -> None:
    config = classes_config(architecture)()
    for name, value in DEFAULTS[architecture].items():
        if name == "rope_theta":
            assert config.rope_parameters["rope_theta"] == value
        elif name == "rope_parameters":
            assert {k: v for k, v in config.rope_parameters.items() if k != "rope_theta"} == value
        else:
            older = OLDER and meant(architecture, name) is ...  # the class did not know the key yet
            assert older or meant(architecture, name) == value, name


class Recording(Mapping[str, Any]):
    """A configuration that remembers which of its keys were asked for."""

    def __init__(self, raw: Mapping[str, Any], asked: set[str]) -> None:
        self.raw, self.asked = raw, asked

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return self.raw[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.raw)

    def __len__(self) -> int:
        return len(self.raw)


@pytest.mark.parametrize("architecture", DEFINITIONS)
def test_every_key_that_is_read_has_its_default(architecture: str, tmp_path: Path) -> None:
    asked: set[str] = set()
    small = completed(architecture, {**SMALL, **NON_DEFAULT.get(architecture, {})})
    with torch.device("meta"):
        DEFINITIONS[architecture](Recording(small, asked))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], **small}))
    ModelConfig.from_directory(tmp_path)
    known = {one for name in DEFAULTS[architecture] for one in (name, *OLDER_NAMES.get(name, ()))}
    for name in asked - known - SMALL.keys():
        assert meant(architecture, name) in (..., None), f"{name} is read and has no default"


@pytest.mark.parametrize("architecture", DEFINITIONS)
def test_only_keys_that_are_no_defaults_mean_the_same_model(architecture: str, tmp_path: Path) -> None:
    without = {name: None for name in SIZES}  # those of save_tiny are left out too
    changes = {**SMALL, **NON_DEFAULT.get(architecture, {})}
    theirs = save_tiny(tmp_path, architecture, only=changes)
    kept = theirs.config.to_diff_dict()
    kept = {n: v for n, v in kept.items() if n in changes or n in ("architectures", "model_type")}
    assert len(kept) < len(without) + 8
    (tmp_path / "config.json").write_text(json.dumps(kept))
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    model, config = load_tiny(tmp_path, "own")
    requests = draw_tokens(0, 9, 3)
    steps = Steps(requests)
    got = run_schedule(model, steps, [{0: 5, 1: 3}, {0: 4}], poisoned_caches(config, "own", steps))
    assert_within_budget(got, theirs, requests)
    ends = theirs.config.eos_token_id
    assert config.eos_ids == (() if ends is None else (ends,))
