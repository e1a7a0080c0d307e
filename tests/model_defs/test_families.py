"""Every family's equations give transformers' logits, however its tokens are batched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import ENTRIES, FAMILIES, ONE_EACH, check, draw_tokens, run, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from step_inputs import Steps, run_schedule, whole
from tiny_models import assert_within_budget, load_tiny, reference, save_tiny
from torch import Tensor

# Tables of 4 pairs each, 8 columns of a head of 16.
LONGROPE = {
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "short_factor": [1.0, 1.2, 1.4, 1.0],
        "long_factor": [1.5, 3.0, 2.0, 5.0],
    },
}  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_decode_and_chunked_mix(family: str, entry: str) -> None:
    requests = draw_tokens(0, 19, 1, 7, 80)
    check(family, entry, requests, whole(requests))
    check(family, entry, requests[2:3], [{0: 1}] * 7)
    mix = [{0: 5, 3: 16}, {1: 1, 3: 1, 0: 1, 2: 3}, {2: 1, 0: 13, 3: 1}, {3: 62, 2: 3}]
    check(family, entry, requests, mix, block_size=16)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("family", ONE_EACH)
def test_greedy_text_is_transformers(family: str, entry: str) -> None:
    theirs, ours, config, _ = tiny(family)
    (prompt,) = draw_tokens(2, 9)
    want = list(prompt)
    for _ in range(16):
        want.append(int(reference(theirs, [want])[0][-1].argmax()))
    got = prompt + [0] * 16
    steps = Steps([got])
    caches = steps.caches(config.num_layers, config.num_kv_heads, config.head_dim, torch.float32)
    for count in (len(prompt), *[1] * 15):
        with torch.no_grad():
            logits: Tensor = ours[entry](kv_caches=caches, **steps.next({0: count}))
        got[steps.computed[0]] = int(logits[-1].argmax())
    assert got == want


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


@settings(max_examples=60, deadline=None)
@given(
    mix=mixes(), family=st.sampled_from(sorted(FAMILIES)), entry=st.sampled_from(ENTRIES),
    block_size=st.sampled_from([1, 4, 16]), num_padding=st.integers(0, 3), seed=st.integers(0, 3),
)  # fmt: skip
def test_any_batch_composition(mix: Any, family: str, entry: str, block_size: int, num_padding: int, seed: int) -> None:
    requests, schedule = mix
    check(family, entry, requests, schedule, block_size=block_size, num_padding=num_padding, seed=seed)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("max_model_len", "lengths"), [(256, (19, 40, 17)), (16, (16, 3, 9)), (None, (16, 3, 9))])
def test_longrope_takes_its_table_by_the_longest_request(
    entry: str, max_model_len: int | None, lengths: tuple[int, ...], tmp_path: Any
) -> None:
    theirs = save_tiny(tmp_path, "Phi3ForCausalLM", **LONGROPE)
    model, config = load_tiny(tmp_path, entry, max_model_len=max_model_len)
    requests = draw_tokens(3, *lengths)
    steps = Steps(requests)
    caches = steps.caches(config.num_layers, config.num_kv_heads, config.head_dim, torch.float32)
    left = {r: n - 2 for r, n in enumerate(lengths)}
    assert_within_budget(run_schedule(model, steps, [{0: 2, 1: 2, 2: 2}, left], caches), theirs, requests)


@pytest.mark.parametrize("entry", ENTRIES)
def test_only_wanted_rows_give_logits(entry: str) -> None:
    requests = draw_tokens(1, 6, 4)
    every = torch.cat(run("llama", entry, requests, whole(requests)))
    _, ours, config, _ = tiny("llama")
    steps = Steps(requests)
    step = steps.next(whole(requests)[0]) | {"logit_rows": torch.tensor([9, 0, 5])}
    caches = steps.caches(config.num_layers, config.num_kv_heads, config.head_dim, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours[entry](kv_caches=caches, **step), every[[9, 0, 5]])


@pytest.mark.parametrize("family", FAMILIES)
def test_both_entries_have_the_checkpoints_parameters(family: str) -> None:
    theirs, ours, config, _ = tiny(family)
    wanted = {name: p.shape for name, p in theirs.named_parameters()}
    for entry in ENTRIES:
        assert {name: p.shape for name, p in ours[entry].named_parameters()} == wanted
        tied = ours[entry].lm_head.weight is ours[entry].model.embed_tokens.weight
        assert tied == config.raw.get("tie_word_embeddings", "Gemma" in config.architecture)
