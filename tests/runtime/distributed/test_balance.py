"""Experts that move between ranks while steps run change no bit of what steps give; where they should be is DeepSeek's
algorithm's answer; a move that fails is an error on every rank, at every step from then on."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from families import draw_tokens
from hypothesis import given
from hypothesis import strategies as st
from moe_families import MOE
from quantized_checkpoints import LAYOUTS, save_quantized
from shared_traces import shared_traces
from step_inputs import Steps
from test_expert_parallel import RowByRow
from tiny_models import save_tiny

from seamwise import ModelRunner
from seamwise.kernels import count_experts, place_experts
from seamwise.kernels.moe.place_experts import table_of
from seamwise.runtime.build.eplb_config import EPLBConfig
from seamwise.runtime.build.step import StepInput, empty_step
from seamwise.runtime.distributed.group import leave_group, meet
from seamwise.runtime.runner import balance
from seamwise.runtime.runner.data_ranks import agree
from seamwise.runtime.runner.expert_placement import (
    Gain,
    balancedness,
    gain_of,
    kept_in_place,
    load_of_ranks,
    moves_between,
    place_by_load,
)

FP8 = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "q_lora_rank": 128,
    "kv_lora_rank": 128, "qk_rope_head_dim": 16, "qk_nope_head_dim": 64, "v_head_dim": 64, "head_dim": 16,
}  # fmt: skip
LOAD: dict[str, Any] = {"dtype": "bfloat16", "device": "cpu"}
SHARED: dict[str, Any] = {"data_parallel_size": 2, "enable_expert_parallel": True, "enable_eplb": True}


def test_the_published_example() -> None:
    """The example in the README of deepseek-ai/EPLB: 12 experts in 4 groups, 16 places, 2 nodes of 4 GPUs."""
    loads = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    assert [place_by_load(np.array(layer), 16, ranks=8, groups=4, nodes=2) for layer in loads] == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


@given(
    seed=st.integers(0, 999), nodes=st.sampled_from([1, 2]), ranks=st.sampled_from([1, 2, 4]),
    groups=st.sampled_from([1, 2, 4]), each=st.integers(1, 6), more=st.integers(0, 2),
)  # fmt: skip
def test_placements(seed: int, nodes: int, ranks: int, groups: int, each: int, more: int) -> None:
    """Every expert has a place, ranks are filled, moves lead from one placement to the other, and a rank keeps what it
    has; the busiest rank is never busier than the mean and the heaviest copy together."""
    ranks, experts = ranks * nodes, groups * each
    places = (-(-experts // ranks) + more) * ranks
    draw = np.random.default_rng(seed)
    loads = draw.zipf(1.5, experts).clip(max=10**6).astype(float)
    found = place_by_load(loads, places, ranks=ranks, groups=groups, nodes=nodes)
    assert {*found} == {*range(experts)} and len(found) == places
    old = place_by_load(draw.permutation(loads), places, ranks=ranks, groups=groups, nodes=nodes)
    kept, share = kept_in_place(found, old, ranks), places // ranks
    for start in range(0, places, share):
        ours, was = kept[start : start + share], old[start : start + share]
        assert sorted(ours) == sorted(found[start : start + share])
        stays = sum(a == b for a, b in zip(ours, was, strict=True))
        assert stays == (Counter(ours) & Counter(was)).total()
    moved = list(old)
    for move in moves_between(old, kept, ranks):
        moved[move.place] = old[move.source]
        there, needs = old[move.place // share * share :][:share], kept[move.place]
        assert (move.source // share == move.place // share) == (needs in there), "sent over the link for nothing"
    assert moved == kept
    copy = loads / np.bincount(found)
    if groups % nodes or nodes == 1:
        assert load_of_ranks(loads, found, ranks).max() <= loads.sum() / ranks + copy.max() + 1e-9


def test_a_gain_is_what_bytes_and_loads_say() -> None:
    """Two ranks of two places; expert 0 has 90 rows of 100, in 10 steps. To swap 1 and 2 moves two experts and saves
    nothing; a second copy of 0 for 1's place would save 40 rows in 10 steps."""
    loads = np.array([90.0, 2, 4, 4])
    gain = gain_of(loads, [0, 1, 2, 3], [0, 2, 1, 3], 2, row_bytes=10, expert_bytes=7, steps_seen=10, steps_ahead=5)
    assert (gain.saved, gain.moved, gain.pays) == (-10, 7, False)
    six = [0, 1, 2, 3, 3, 2]
    gain = gain_of(loads, six, [0, 1, 2, 3, 0, 2], 2, row_bytes=10, expert_bytes=7, steps_seen=10, steps_ahead=5)
    assert load_of_ranks(loads, six, 2).tolist() == [94, 6] and gain.moved == 7
    assert load_of_ranks(loads, [0, 1, 2, 3, 0, 2], 2).tolist() == [49, 51] and gain.saved == (94 - 51) / 10 * 5 * 10
    assert balancedness(loads, six, 2) == 50 / 94
    here = gain_of(loads, six, [0, 1, 0, 3, 3, 2], 2, row_bytes=10, expert_bytes=7, steps_seen=10, steps_ahead=5)
    assert here.moved == 0  # rank 0 copies expert 0 from its own place
    sources = [m.source for m in moves_between([0, 1, 0, 2, 3, 4, 5, 6], [0, 1, 0, 2, 0, 4, 0, 6], 4)]
    assert sources == [0, 2]  # of two ranks that have it, each sends it to one


def test_copies_take_turns() -> None:
    """Rows go to an expert's copies alike, another rank begins with another copy, and padding goes nowhere."""
    table = torch.tensor(table_of([0, 1, 1, 0, 1], 2, 5), dtype=torch.int32)
    assert table.tolist() == [[2, 0, 3, -1, -1], [3, 1, 2, 4, -1]]
    chosen, slots = torch.tensor([[0, 1], [1, 0], [0, -1], [1, 0]], dtype=torch.int32), torch.tensor([4, 5, 6, -1])
    assert place_experts(chosen, slots, table, 0).tolist() == [[0, 1], [2, 3], [0, -1], [-1, -1]]
    assert place_experts(chosen, slots, table, 1).tolist() == [[3, 2], [4, 0], [3, -1], [-1, -1]]
    loads = torch.ones(2, 2, dtype=torch.int32)
    count_experts(torch.cat((chosen, chosen), 1), slots, loads)
    assert loads.tolist() == [[4, 3], [4, 3]]
    with pytest.raises(ValueError, match="4 columns of choices do not divide among 3 layers"):
        count_experts(torch.cat((chosen, chosen), 1), slots, torch.ones(3, 2, dtype=torch.int32))


def equal_steps(
    root: Path, name: str, rank: int, counts: list[dict[int, int]], *, alone: bool = False, **options: Any
) -> ModelRunner:  # fmt: skip
    """Compare a rank's steps with those of ranks that move no expert and take no step as two, or one that has all; in
    bits; return the runner.

    Requests repeat a token, so that few experts have all the load.
    """
    requests = [[7] * 150, [7, 9] * 75, *draw_tokens(5, 150)]
    shared = ModelRunner.load(root / name, **SHARED, **(LOAD | options))
    options = {n: x for n, x in options.items() if "dbo" not in n}
    if alone:
        other = ModelRunner.load(root / name, **(LOAD | {n: x for n, x in options.items() if n != "eplb_config"}))
    else:
        options["eplb_config"] = replace(options["eplb_config"], step_interval=10**9)
        other = ModelRunner.load(root / name, **SHARED, **(LOAD | options))
    recorded = not shared.options.enforce_eager
    steps = [Steps(requests, block_size=runner.block_size) for runner in (shared, other)]
    for runner, made in zip((shared, other), steps, strict=True):
        runner.allocate_kv(made.num_blocks)
    for each in counts:
        batches = [StepInput(**made.next(each)) if each else empty_step() for made in steps]
        if alone:
            (batches[1],), _ = agree(batches[1], other.options)  # as many rows
        with nullcontext() if recorded else RowByRow():
            ours, theirs = (r.step(b).logits.clone() for r, b in zip((shared, other), batches, strict=True))
        worst = float((ours - theirs[: len(ours)]).abs().max()) if each else 0.0
        assert worst <= (0.03 if recorded else 0.0), f"{name}: {each} differs by {worst}"
    return shared


def check_moves(root: Path, name: str, rank: int, redundant: int, layers: int, **options: Any) -> None:
    """Loads of four steps, twice: the experts of every layer move, one layer a step, and again when loads change."""
    config = EPLBConfig(window_size=4, step_interval=4, num_redundant_experts=redundant)
    early = [{0: 30} if rank == 0 else {0: 20, 1: 10}] * 4
    runner = equal_steps(
        root, name, rank, [*early, {}, *[{2: 30}] * 4, {}] if rank else [*early, {0: 2}, *[{2: 30}] * 4, {0: 3}],
        eplb_config=config, enforce_eager=True, **options,
    )  # fmt: skip
    assert runner.balancer is not None
    stats, tables = runner.balancer.stats, runner.balancer.layers
    assert stats.layers >= layers and stats.experts > 0
    assert np.mean(stats.predicted) >= np.mean(stats.found)
    reports = {r.name: r for r in runner.program.reports}
    assert reports["balance_experts"].matched == reports["balance_experts"].expected == len(tables)
    seen: list[Any] = [None, None]
    dist.all_gather_object(seen, [layer.places for layer in tables])
    assert seen[0] == seen[1] and any(p != balance.first_places(max(p) + 1, redundant) for p in seen[0])
    for refused in ("weights_digest", "start_weight_update"):
        with pytest.raises(ValueError, match="experts move between ranks"):
            getattr(runner, refused)()


def check_not_moved(root: Path, rank: int) -> None:
    """What a step or two of few rows would save is less than an expert's bytes: it is found, and not done."""
    config = EPLBConfig(window_size=2, step_interval=2, num_redundant_experts=2)
    runner = equal_steps(root, "qwen3", rank, [{0: 2}, {0: 2}, {0: 2}, {2: 1}], eplb_config=config)
    assert runner.balancer is not None
    stats = runner.balancer.stats
    assert stats.layers == 0 and stats.declined > 0 and stats.found == stats.predicted


def check_two_batches(root: Path, rank: int) -> None:
    """Experts move between steps that are taken as two in turns; both halves' choices are counted."""
    config = EPLBConfig(window_size=4, step_interval=4, num_redundant_experts=2)
    two = {"enable_dbo": True, "dbo_decode_token_threshold": 2, "dbo_prefill_token_threshold": 4}
    early = [{0: 15, 1: 15}] * 4
    runner = equal_steps(
        root, "qwen3", rank, [*early, *[{2: 10, 1: 10}] * 2], eplb_config=config, enforce_eager=True, **two
    )  # fmt: skip
    assert runner.balancer is not None and runner.balancer.stats.layers > 0
    assert runner.recording_stats.steps["in_turns"] == 6
    counted = runner.balancer._window[3].sum(-1)  # of the step before the third
    assert counted.tolist() == [3 * 30] * len(runner.balancer.layers)


def check_recorded(root: Path, rank: int) -> None:
    """Experts move while decode is replayed from recordings, which read weights and tables where they are."""
    config = EPLBConfig(window_size=3, step_interval=3, num_redundant_experts=2)
    counts = [{0: 4, 1: 4}, *[{0: 1, 1: 1}] * 9]
    with patch.object(balance, "gain_of", return_value=Gain(saved=2, moved=1)):
        runner = equal_steps(root, "fp8", rank, counts, eplb_config=config, dtype="float32")
    assert runner.balancer is not None and runner.balancer.stats.layers > 0
    assert runner.recording_stats.steps["full"] == 9


def check_failed(root: Path, rank: int) -> None:
    """One rank's failure before rows are sent, and other weights than an expert's that arrive, are every rank's."""
    config = EPLBConfig(window_size=2, step_interval=2, num_redundant_experts=2)
    for words in ("model.layers.0.mlp, rank 1: MemoryError: no room", "rank .: RuntimeError: place .+ other weights"):
        runner = ModelRunner.load(root / "qwen3", **SHARED, **LOAD, eplb_config=config, enforce_eager=True)
        made = Steps([[7] * 99], block_size=runner.block_size)
        runner.allocate_kv(made.num_blocks)
        steps = [StepInput(**made.next({0: 30})) for _ in range(3)]
        runner.step(steps[0])
        assert runner.balancer is not None
        early = "MemoryError" in words
        if not early:
            for layer in runner.balancer.layers:
                layer.digests = [number + 1 for number in runner.balancer._digests(layer)]
        raising = patch.object(balance, "moves_between", side_effect=MemoryError("no room"))
        with (
            raising if early and rank else nullcontext(),
            pytest.raises(RuntimeError, match=f"experts could not be moved.*{words}"),
        ):
            runner.step(steps[1])
        with pytest.raises(RuntimeError, match="step: enable_eplb: experts could not be moved"):
            runner.step(steps[2])


@shared_traces()
def work(rank: int, home: str) -> None:
    torch.set_num_threads(1)
    root = Path(home)
    meet(str(root / f"group-{os.getppid()}"), rank, 2, "cpu", timeout_s=120)
    try:
        LOAD["pack_dir"] = root / f"packs{rank}"
        check_moves(root, "qwen3", rank, 2, 2, alone=True)
        with patch.object(balance, "gain_of", return_value=Gain(saved=2, moved=1)):  # experts of many bytes
            check_moves(root, "fp8", rank, 2, 1, dtype="float32")
        check_two_batches(root, rank)
        check_recorded(root, rank)
        check_not_moved(root, rank)
        check_failed(root, rank)
        with pytest.raises(ValueError, match="11 do not divide among 2 ranks"):
            ModelRunner.load(root / "qwen3", **SHARED, **LOAD, eplb_config={"num_redundant_experts": 3})
        dist.barrier()
    finally:
        leave_group()


@pytest.mark.slow
def test_moves_change_no_bit(tmp_path: Path, run_ranks: Callable[..., None]) -> None:
    save_tiny(tmp_path / "qwen3", *MOE["qwen3_moe"][:1], **MOE["qwen3_moe"][1])
    save_quantized(tmp_path / "fp8", LAYOUTS["fp8 blocks"], torch.float32, "DeepseekV3ForCausalLM", **FP8)
    run_ranks(work, 2, str(tmp_path))


def test_what_does_not_go_together_is_refused(tiny_llama_dir: Path) -> None:
    def load(**options: Any) -> None:
        ModelRunner.load(tiny_llama_dir, device="cpu", **options)

    with pytest.raises(ValueError, match=r"enable_eplb moves experts between ranks.*data_parallel_size above 1"):
        load(enable_eplb=True)
    with pytest.raises(ValueError, match="eplb_config needs enable_eplb=True"):
        load(eplb_config={"window_size": 3})
    with pytest.raises(ValueError, match="no option of eplb_config: 'policy'; wanted one of num_redundant"):
        load(enable_eplb=True, eplb_config={"policy": "default"})
    with pytest.raises(ValueError, match=r"eplb_config=\[\], wanted a mapping with options of window_size"):
        load(enable_eplb=True, eplb_config=[])
    with pytest.raises(ValueError, match="eplb_config: step_interval=0; wanted a whole number of at least 1"):
        load(enable_eplb=True, eplb_config={"step_interval": 0})
