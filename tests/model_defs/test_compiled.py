"""Compiled, every family keeps its promises and gives transformers' logits, from either entry, and from its pack."""

from __future__ import annotations

import copy
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ENTRIES, FAMILIES, draw_tokens, tiny
from step_inputs import run_runner
from tiny_models import assert_within_budget, save_tiny

from seamwise import ModelRunner

DTYPES = [torch.float32, torch.bfloat16]
PASSES = ("raise_rms_norm", "raise_rope", "raise_swiglu", "fuse_add_rms_norm", "fuse_gate_up", "fuse_qkv")
# Matches of two layers: norms, rotated tensors, gated MLPs, sums joined with norms, gate-up pairs, query-key-values.
MATCHES = {
    "llama": (5, 4, 2, 4, 2, 2),
    "mistral": (5, 4, 2, 4, 2, 2),
    "qwen2": (5, 4, 2, 4, 2, 2),
    "qwen3": (9, 4, 2, 4, 2, 2),
    "phi3": (5, 4, 2, 4, 0, 0),
    "phi3, partial rope": (5, 4, 2, 4, 0, 0),
    "gemma2": (9, 4, 2, 4, 2, 2),
    "gemma3": (13, 4, 2, 4, 2, 2),
}
# Architectures that only transformers defines, and how they differ from a family here.
OTHERS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "Olmo2ForCausalLM": ({}, (9, 4, 2, 1, 2, 2)),  # norms after attention and MLP only, and on whole queries and keys
    "GraniteForCausalLM": (
        {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0}, (5, 4, 2, 4, 2, 2)
    ),
    "SmolLM3ForCausalLM": ({"num_hidden_layers": 4}, (9, 6, 4, 8, 4, 4)),  # the fourth layer has no positions
    "Glm4ForCausalLM": ({"head_dim": 8}, (9, 0, 2, 4, 0, 2)),  # turns neighbouring columns, which is not `rope`
    "CohereForCausalLM": ({"tie_word_embeddings": True}, (0, 0, 2, 0, 2, 2)),  # likewise; LayerNorm
}  # fmt: skip


def check(directory: Path, theirs: Any, matches: tuple[int, ...], dtype: torch.dtype, **options: Any) -> None:
    """Hold the passes' counts to their promise and the logits of a chunked mix and of decode steps to transformers'."""
    options["disable_hybrid_kv_cache_manager"] = True  # the steps here have one block table
    runner = ModelRunner.load(directory, dtype=dtype, device="cpu", **options)
    counts = {r.name: (r.matched, r.expected) for r in runner.program.reports}
    assert [counts[name] for name in PASSES] == [(n, n) for n in matches]
    assert all(expected in (None, matched) for matched, expected in counts.values()), counts
    requests = draw_tokens(4, 19, 3, 33)
    got = run_runner(runner, requests, ({0: 6, 2: 31}, {1: 1, 0: 11, 2: 1}, {0: 1, 1: 1, 2: 1}, {0: 1, 1: 1}))
    assert_within_budget(got, copy.deepcopy(theirs), requests)


@pytest.mark.parametrize(
    ("family", "entry", "dtype"),  # each pair of them, not each triple
    [(f, e, DTYPES[(i + j) % 2]) for i, f in enumerate(MATCHES) for j, e in enumerate(ENTRIES)], ids=str,
)  # fmt: skip
def test_a_family_keeps_its_promises(family: str, entry: str, dtype: torch.dtype) -> None:
    theirs, _, _, directory = tiny(family)
    check(directory, theirs, MATCHES[family], dtype, entry=entry, pack_dir=None)


@pytest.mark.parametrize(("architecture", "dtype"), zip(OTHERS, cycle(DTYPES)), ids=str)
def test_an_architecture_of_transformers_keeps_its_promises(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    changes, matches = OTHERS[architecture]
    check(tmp_path, save_tiny(tmp_path, architecture, **changes), matches, dtype, pack_dir=None)


def test_weights_made_of_norms_come_back_from_a_pack(pack_dir: Path) -> None:
    theirs, _, _, directory = tiny("gemma3")
    for _ in ("compiled", "from its pack"):
        check(directory, theirs, MATCHES["gemma3"], torch.bfloat16, pack_dir=pack_dir)


def test_a_pack_holds_longropes_table_for_its_length(tmp_path: Path, pack_dir: Path) -> None:
    tables = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, **tables}
    architecture, changes = FAMILIES["phi3"]
    theirs = save_tiny(tmp_path, architecture, **changes, rope_parameters=rope, original_max_position_embeddings=64)
    for _ in ("compiled", "from its pack"):
        check(tmp_path, theirs, MATCHES["phi3"], torch.float32, pack_dir=pack_dir)
        with pytest.raises(AssertionError, match="budget"):  # transformers takes the short table for short requests
            check(tmp_path, theirs, MATCHES["phi3"], torch.float32, max_model_len=65, pack_dir=pack_dir)
