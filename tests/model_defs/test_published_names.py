"""Checkpoints with the names that they were published under give transformers' logits through its classes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from step_inputs import Steps, run_schedule
from test_hf import DECODERS
from tiny_models import assert_within_budget, load_tiny, save_tiny
from torch import Tensor

Tensors = dict[str, Tensor]


def renamed(*rules: tuple[str, str], **more: Callable[[], Tensor]) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        for old, new in rules:
            tensors = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
        return tensors | {name.replace("__", "."): make() for name, make in more.items()}

    return change


def mask() -> Tensor:
    return torch.ones(1, 1, 8, 8, dtype=torch.uint8)


PUBLISHED: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    # openai-community/gpt2: the base model's names, and buffers of masks
    "gpt2": ("GPT2LMHeadModel", renamed((r"^transformer\.", ""), h__0__attn__bias=mask)),
    # facebook/opt-125m
    "opt": ("OPTForCausalLM", renamed((r"^model\.decoder", "decoder"))),
    # EleutherAI/pythia-70m
    "pythia": (
        "GPTNeoXForCausalLM",
        renamed(
            gpt_neox__layers__0__attention__bias=mask,
            gpt_neox__layers__0__attention__masked_bias=lambda: torch.tensor(-1e9),
            gpt_neox__layers__0__attention__rotary_emb__inv_freq=lambda: torch.ones(4),
        ),
    ),
    # as transformers itself saves them
    "phimoe": ("PhimoeForCausalLM", renamed()),
    "granitemoe": ("GraniteMoeForCausalLM", renamed()),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_are_read(name: str, tmp_path: Path) -> None:
    architecture, change = PUBLISHED[name]
    theirs: Any = save_tiny(tmp_path, architecture, **DECODERS[architecture])
    tensors = change(load_file(tmp_path / "model.safetensors"))
    save_file({n: t.clone() for n, t in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    model, _ = load_tiny(tmp_path, "transformers")
    requests = [[5, 77, 3, 18, 44], [7, 8]]
    steps = Steps(requests)
    got = run_schedule(model, steps, [{0: 2, 1: 2}, {0: 3}], steps.caches_of(model))
    assert_within_budget(got, theirs, requests)


def test_what_no_rule_knows_is_still_extra(tmp_path: Path) -> None:
    save_tiny(tmp_path, "GPT2LMHeadModel", **DECODERS["GPT2LMHeadModel"])
    tensors = load_file(tmp_path / "model.safetensors") | {"transformer.h.0.attn.adapter": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"extra transformer\.h\.0\.attn\.adapter"):
        load_tiny(tmp_path, "transformers")
