"""Recorded steps: in every mode a step gives what it gives eagerly, and writes the same; memory is planned."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import draw_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_families import tiny_moe
from step_inputs import Steps
from torch import Tensor

from seamwise import ModelRunner
from seamwise.compile.startup_times import Ledger
from seamwise.runtime.build.step import StepInput, ragged_step
from seamwise.runtime.runner.recordings import Full, Piecewise

MODES = ("none", "full_decode_only", "piecewise", "full_and_piecewise")
LENGTHS = (19, 2, 33, 7)
# Prefill in chunks, a mix, decodes of four and three, a step of more tokens than any size.
SCHEDULE = ({0: 3, 2: 2}, {1: 1, 0: 11, 2: 1}, {0: 1, 1: 1, 2: 1, 3: 1}, {0: 1, 2: 1, 3: 1}, {2: 28, 3: 4})


def another(runner: ModelRunner, **options: Any) -> ModelRunner:
    """Return a runner of the same compiled model with other options."""
    return ModelRunner(runner.config, replace(runner.options, **options), runner.executable, Ledger(), runner.buffers)


def run(runner: ModelRunner, schedule: Any = SCHEDULE, seed: int = 0) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Return each step's logits, and the caches at the end; what no step writes is NaN, the null block too."""
    steps = Steps(draw_tokens(seed, *LENGTHS), block_size=runner.block_size, seed=seed)
    groups, each = len(runner.kv_groups), steps.num_blocks  # each group has as many blocks for itself
    runner.allocate_kv(groups * each)
    for cache_ in (c for layer in runner.kv_caches for c in layer):
        cache_.fill_(torch.nan)
    logits = []
    for counts in schedule:
        plain = StepInput(**steps.next(counts))
        if groups > 1:
            slots = [plain.slot_mapping + g * each * runner.block_size for g in range(groups)]
            tables = [plain.block_table + g * each for g in range(groups)]
            plain = replace(plain, slot_mapping=torch.stack(slots), block_table=torch.stack(tables))
        logits.append(runner.step(plain).logits.clone())
    return logits, runner.kv_caches


def assert_same(got: Any, want: Any) -> None:
    for a, b in zip(got[0], want[0], strict=True):
        assert torch.equal(a, b) and not a.isnan().any()
    torch.testing.assert_close(got[1], want[1], atol=0, rtol=0, equal_nan=True)


@cache
def loaded(directory: Path, **options: Any) -> ModelRunner:
    given = {"device": "cpu", "max_model_len": 64, "block_size": 4, "cudagraph_mode": "piecewise"}
    return ModelRunner.load(directory, **(given | {"cudagraph_capture_sizes": (2, 4, 16, 20)} | options))


@pytest.fixture(scope="module")
def runner(tiny_llama_dir: Path) -> ModelRunner:
    return loaded(tiny_llama_dir, dtype="bfloat16")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_what_eager_gives(runner: ModelRunner, mode: str) -> None:
    recorded = another(runner, cudagraph_mode=mode)
    want = run(another(runner, cudagraph_mode="none"))
    assert_same(run(recorded), want)
    assert_same(run(recorded, seed=0), want)  # recordings begin anew with the caches
    steps = recorded.recording_stats.steps
    eager = {"none": 10, "full_decode_only": 6, "piecewise": 2, "full_and_piecewise": 2}[mode]
    full = {"none": 0, "full_decode_only": 4, "piecewise": 0, "full_and_piecewise": 4}[mode]
    assert steps == Counter({"eager": eager, "full": full, "piecewise": 10 - eager - full})


# Three requests prefill, then verify 3, 2, 3 and 4 drafts and more beside a token; a ragged one; decode between.
VERIFYING = (
    {0: 5, 2: 6, 3: 2}, {0: 4, 2: 4, 3: 4}, {0: 3, 2: 3}, {0: 1, 2: 1}, {0: 4, 2: 4}, {0: 2, 2: 1}, {2: 5}, {2: 4},
)  # fmt: skip


def test_verify_steps_replay_in_full_too(runner: ModelRunner) -> None:
    recorded = another(runner, cudagraph_mode="full_decode_only", num_speculative_tokens=3)
    want = run(another(runner, cudagraph_mode="none"), VERIFYING)
    assert_same(run(recorded, VERIFYING), want)
    stats = recorded.recording_stats
    assert stats.recorded == [Full(3, 4), Full(2, 3), Full(2, 1), Full(2, 4), Full(1, 4)]
    again = run(recorded, VERIFYING)
    assert_same(again, want)
    assert stats.steps == {"full": 10, "eager": 6} and recorded.recording(2, 3) is recorded.recording(2, 3)
    assert recorded.capture_plan().keys == (Full(256, 1), Full(256, 4))


def test_two_tokens_of_one_request_are_no_decode_of_two(runner: ModelRunner) -> None:
    """As many tokens as requests, but one has none: no recording of a uniform step may serve it."""
    recorded = another(runner, cudagraph_mode="full_decode_only")
    recorded.allocate_kv(9)
    batch = ragged_step(
        np.array([3, 5]), np.array([[1], [2]], dtype=np.int32), np.array([0, 0]), np.array([2, 0]), 4, np.array([0, 1])
    )
    recorded.step(batch)
    assert recorded.recording_stats.steps == {"eager": 1}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_experts_and_latents_too(family: str) -> None:
    built = loaded(tiny_moe(family)[1], dtype="float32", max_recorded_requests=64)
    got = run(built)
    want = run(another(built, cudagraph_mode="none"))
    for a, b in zip(got[0], want[0], strict=True):  # a linear of torch's sums 16 rows in another order than 13
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[1], want[1], atol=1e-5, rtol=1e-5, equal_nan=True)
    assert built.recording_stats.steps["piecewise"] == 4


def test_transformers_own_class_too(tiny_llama_dir: Path) -> None:
    built = loaded(tiny_llama_dir, dtype="bfloat16", entry="transformers")
    assert_same(run(built), run(another(built, cudagraph_mode="none")))
    assert built.recording_stats.steps["piecewise"] == 4


@settings(max_examples=25, deadline=None)
@given(st.lists(st.dictionaries(st.integers(0, 3), st.integers(1, 6), min_size=1), max_size=6), st.integers(0, 99))
def test_any_schedule(tiny_llama_dir: Path, schedule: list[dict[int, int]], seed: int) -> None:
    left = list(LENGTHS)
    for counts in schedule:
        for r in list(counts):
            counts[r] = min(counts[r], left[r])
            left[r] -= counts[r]
            if not counts[r]:
                del counts[r]
    schedule = [counts for counts in schedule if counts]
    built = loaded(tiny_llama_dir, dtype="bfloat16")
    assert_same(
        run(another(built, cudagraph_mode="full_and_piecewise"), schedule, seed),
        run(another(built, cudagraph_mode="none"), schedule, seed),
    )


def test_models_interleave_in_one_process(tmp_path: Path, runner: ModelRunner) -> None:
    others = [loaded(tiny_moe("mixtral")[1], dtype="float32", cudagraph_mode="full_and_piecewise")]
    runners = [another(runner, cudagraph_mode="full_and_piecewise"), *others]
    alone = [run(r)[0] for r in runners]
    batches = []
    for r in runners:
        steps = Steps(draw_tokens(0, *LENGTHS), block_size=r.block_size, seed=0)
        r.allocate_kv(steps.num_blocks)
        batches.append([StepInput(**steps.next(counts)) for counts in SCHEDULE])
    for i in range(len(SCHEDULE)):
        now = [r.step(batch[i]).logits for r, batch in zip(runners, batches, strict=True)]
        for got, want in zip(now, alone, strict=True):  # the first runner's are whole after the second has run
            assert torch.equal(got, want[i])


def test_what_is_beyond_the_budget_runs_eagerly_and_is_counted(runner: ModelRunner) -> None:
    plan = runner.capture_plan()
    budget = plan.num_bytes(Piecewise(4))
    tight = another(runner, max_recorded_bytes=budget)
    assert_same(run(tight), run(another(runner, cudagraph_mode="none")))
    stats = tight.recording_stats
    assert stats.recorded == [Piecewise(4)] and stats.steps == {"over_budget": 2, "piecewise": 2, "eager": 1}
    assert tight.capture_plan().total_bytes == budget
    words = str(tight.capture_plan())
    assert words.count("too much: runs eagerly") == 2 and "piecewise    20 tokens" in words
    assert not another(runner, cudagraph_mode="none").capture_plan().keys


def test_the_plan_is_what_recordings_take(runner: ModelRunner) -> None:
    big = another(runner, cudagraph_capture_sizes=(256,))
    tokens = torch.arange(200)
    big.allocate_kv(64)
    batch = StepInput(
        token_ids=tokens % 97, positions=tokens % 50, slot_mapping=4 + tokens,
        block_table=(1 + torch.arange(4 * 13).view(4, 13) % 50).int(),
        seq_lens=torch.full((4,), 50, dtype=torch.int32), query_starts=torch.arange(0, 201, 50, dtype=torch.int32),
        logit_rows=torch.tensor([49, 199]),
    )  # fmt: skip
    assert big.step(batch).logits.shape == (2, 512)
    planned = big.capture_plan().num_bytes(Piecewise(256)) - big.capture_plan().input_bytes
    assert 0.5 < big.recording_stats.num_bytes / planned < 1.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cudagraph_mode": "FULL"}, "cudagraph_mode='FULL': wanted one of 'none'"),
        ({"cudagraph_mode": "piecewise", "enforce_eager": True}, "contradict"),
        ({"cudagraph_capture_sizes": (4, 2)}, "wanted rising numbers of tokens"),
        ({"cudagraph_capture_sizes": ()}, "wanted rising numbers of tokens"),
        ({"cudagraph_capture_sizes": (0, 2)}, "wanted rising numbers of tokens"),
    ],
)
def test_options_that_cannot_be_are_refused(runner: ModelRunner, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(runner.options, **({"cudagraph_mode": None} | options))


def test_the_default_is_what_pays_on_the_device(runner: ModelRunner) -> None:
    default = replace(runner.options, cudagraph_mode=None)
    assert default.recorded_modes == ("full",)
    assert replace(default, device="cuda").recorded_modes == ("full", "piecewise")
    assert replace(default, max_recorded_requests=0).recorded_modes == ()
