"""Groups of layers: what a prefix hit is, what a window gives back, and models whose layers differ in what they see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from moe_families import MOE
from shared_traces import sharing_traces
from tiny_adapters import logits_of, save_adapter
from tiny_models import save_tiny

from seamwise import LLM, ModelRunner, SamplingParams
from seamwise.bench.kv import PUBLISHED, held
from seamwise.runtime.build.kv_groups import FULL, Groups, KVGroup, blocks_of, most_tokens
from seamwise.runtime.build.step import ragged_step
from seamwise.runtime.engine.engine import Engine
from seamwise.runtime.engine.lora_request import LoRARequest
from seamwise.runtime.kv.hits import longest_hit, name_in
from seamwise.runtime.kv.pool import BlockPool
from seamwise.runtime.scheduler.config import SchedulerConfig
from seamwise.runtime.scheduler.plan import plan
from seamwise.runtime.scheduler.policies import find_policy
from seamwise.runtime.scheduler.policies.conformance import draw_view
from seamwise.runtime.scheduler.scheduler import Scheduler
from seamwise.runtime.scheduler.sequence import Sequence
from seamwise.runtime.scheduler.view import Candidate
from seamwise.testing import FakeRunner

traces = sharing_traces()

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False, logprobs=1)
GROUPS = st.one_of(
    st.sampled_from([FULL, KVGroup(kind="latent")]),
    st.builds(KVGroup, kind=st.sampled_from(["sliding_window", "chunked_local"]), size=st.integers(1, 9)),
)


def reads(group: KVGroup, position: int) -> set[int]:
    """Return the positions that a token reads, by its group's definition, word by word."""
    every = set(range(position + 1))
    match group.kind:
        case "sliding_window":
            return {p for p in every if position - p < group.size}
        case "chunked_local":
            return {p for p in every if p // group.size == position // group.size}
    return every


@given(groups=st.lists(GROUPS, min_size=1, max_size=3), size=st.integers(1, 4), data=st.data())
def test_a_hit_is_exactly_what_all_groups_can_serve(groups: list[KVGroup], size: int, data: st.DataObject) -> None:
    names = [bytes([i]) * 16 for i in range(data.draw(st.integers(0, 9)))]
    found = {name_in(n, g): 1 for g in range(len(groups)) for n in names if data.draw(st.integers(0, 3))}

    def servable(hits: int) -> bool:
        return all(
            name_in(names[p // size], g) in found
            for g, group in enumerate(groups)
            for later in range(hits * size, hits * size + 12)
            for p in reads(group, later)
            if p < hits * size
        )

    assert longest_hit(tuple(groups), size, names, found) == max(h for h in range(len(names) + 1) if servable(h))


@given(group=GROUPS, position=st.integers(0, 40))
def test_first_needed_is_the_first_that_any_later_token_reads(group: KVGroup, position: int) -> None:
    later = range(position, position + 20)
    assert group.first_needed(position) == min(min(reads(group, p)) for p in later)


@given(groups=st.lists(GROUPS, min_size=1, max_size=3), size=st.integers(1, 4), blocks=st.integers(0, 30))
def test_the_longest_request_that_fits_is_the_longest(groups: list[KVGroup], size: int, blocks: int) -> None:
    length = most_tokens(tuple(groups), size, blocks, 3, 50)
    assert blocks_of(tuple(groups), size, length, 3) <= blocks
    assert length == 50 or blocks_of(tuple(groups), size, length + 1, 3) > blocks


@pytest.mark.parametrize(("kind", "size"), [("full", 3), ("sliding_window", 0), ("chunked_local", -1)])
def test_a_group_that_is_none_is_refused(kind: Any, size: int) -> None:
    with pytest.raises(ValueError, match="only windows and chunks have a size"):
        KVGroup(kind=kind, size=size)


def held_at(tokens: int, groups: Groups) -> int:
    """Return the blocks of 16 tokens that a request holds when as many of its tokens are computed, and it decodes."""
    runner = FakeRunner(num_blocks=4000, block_size=16, max_model_len=tokens + 8, kv_groups=groups)
    engine = Engine(runner, None, SchedulerConfig(max_num_batched_tokens=512))  # type: ignore[arg-type]
    engine.add_request("long", [5] * tokens, GREEDY)
    held = 0
    while engine.has_unfinished_requests():
        engine.step()
        engine.scheduler.check()
        if engine._loop.flights and int(engine.scheduler.slots.computed.max()) >= tokens:
            held = held or len(engine.scheduler.pool.holders)
    engine.close()
    return held


@pytest.mark.parametrize(
    ("model", "most"), [("Gemma 2 2B", 0.77), ("Gemma 3 270M", 0.23), ("Mistral 7B v0.1", 0.54), ("gpt-oss 20B", 0.52)]
)
def test_blocks_held_at_8k_tokens(model: str, most: float) -> None:
    """Blocks that an engine holds of a request of 8,192 tokens, beside one group for all, and what bench kv prints."""
    groups = PUBLISHED[model]
    one_for_all, grouped = len(groups) * held_at(8192, (FULL,)), held_at(8192, groups)
    print(f"{model}: {grouped} blocks at 8192 tokens, {one_for_all} in one group: {grouped / one_for_all:.3f}")
    said, said_of_one = held(groups, 16, [8192])[8192]
    assert one_for_all == len(groups) * 513 and said_of_one == len(groups) * 512
    assert grouped / one_for_all <= most
    assert abs(grouped - said) <= len(groups)  # where a window begins and ends within its blocks


WINDOWS: dict[str, tuple[str, dict[str, Any], int]] = {  # architecture, changes, groups
    "gemma2": (*FAMILIES["gemma2"], 2),
    "gemma3, five layers to one": (
        FAMILIES["gemma3"][0], {**FAMILIES["gemma3"][1], "sliding_window_pattern": 3, "num_hidden_layers": 7}, 4
    ),
    "mistral": (*FAMILIES["mistral"], 1),
    "gpt_oss": (*MOE["gpt_oss"], 2),
}  # fmt: skip


@pytest.mark.parametrize(("family", "entry"), [*((family, "own") for family in WINDOWS), ("gemma2", "transformers")])
def test_models_with_windows_answer_as_transformers(family: str, entry: str, tmp_path: Path, pack_dir: Path) -> None:
    architecture, changes, groups = WINDOWS[family]
    model = save_tiny(tmp_path / family, architecture, **changes)
    llm = LLM(
        tmp_path / family, dtype="float32", device="cpu", max_model_len=128, pack_dir=pack_dir, block_size=4,
        max_num_batched_tokens=24, num_gpu_blocks_override=60 * groups, max_num_seqs=3, entry=entry,
    )  # fmt: skip
    assert len(llm.engine.runner.kv_groups) == groups
    assert {g.kind for g in llm.engine.runner.kv_groups} - {"full"} == {"sliding_window"}
    stem = torch.randint(3, 97, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [stem, stem[:37] + [7] * 4, stem[:50], [9] * 5, stem]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], GREEDY)
    outputs += llm.generate([{"prompt_token_ids": stem}], GREEDY)
    assert outputs[-1].metrics.num_cached_tokens == 56
    for prompt, output in zip([*prompts, stem], outputs, strict=True):
        got = output.outputs[0].token_ids
        with torch.no_grad():
            logits = model(torch.tensor([prompt + got[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(got).unsqueeze(1)).squeeze(1)
        assert float((logits.amax(1) - chosen).max()) < 1e-4, f"{family}: the prompt of {len(prompt)} tokens"
        given = [found[token].logprob for token, found in zip(got, output.outputs[0].logprobs, strict=True)]
        torch.testing.assert_close(torch.tensor(given), chosen - logits.logsumexp(1), atol=1e-4, rtol=0)
    llm.engine.scheduler.check()


@pytest.mark.parametrize("cudagraph_mode", ["none", "full_and_piecewise"])
def test_adapters_in_models_with_windows_are_pefts(cudagraph_mode: str, tmp_path: Path, pack_dir: Path) -> None:
    """One prompt with an adapter and without, twice: each finds the blocks of its own kind."""
    save_tiny(tmp_path / "model", WINDOWS["gemma2"][0], **WINDOWS["gemma2"][1])
    theirs = save_adapter(tmp_path / "adapter", tmp_path / "model", seed=1)
    options = {"dtype": "float32", "device": "cpu", "max_model_len": 128, "block_size": 4, "pack_dir": pack_dir}
    options |= {"max_num_batched_tokens": 24, "num_gpu_blocks_override": 120, "cudagraph_mode": cudagraph_mode}
    adapted = LLM(tmp_path / "model", enable_lora=True, max_loras=1, **options)
    assert len(adapted.engine.runner.kv_groups) == 2
    prompt = torch.randint(3, 97, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    given = [{"prompt_token_ids": prompt}] * 2
    lora = LoRARequest("one", 1, str(tmp_path / "adapter"))
    (base,) = LLM(tmp_path / "model", **options).generate(given[:1], GREEDY)
    for hits in (0, 56):
        with_it, without = adapted.generate(given, GREEDY, lora_request=[lora, None])
        assert with_it.metrics.num_cached_tokens == without.metrics.num_cached_tokens == hits
        assert without.outputs[0].token_ids == base.outputs[0].token_ids
        got = with_it.outputs[0].token_ids
        logits = logits_of(theirs, [prompt + got[:-1]])[0][len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(got).unsqueeze(1)).squeeze(1)
        assert float((logits.amax(1) - chosen).max()) < 1e-4
    adapted.engine.scheduler.check()


def test_a_window_that_holds_the_longest_request_is_none(tmp_path: Path, pack_dir: Path) -> None:
    save_tiny(tmp_path, "MistralForCausalLM", sliding_window=64)
    options = {"dtype": "float32", "device": "cpu", "pack_dir": pack_dir}
    assert ModelRunner.load(tmp_path, max_model_len=64, **options).kv_groups == (FULL,)
    assert ModelRunner.load(tmp_path, max_model_len=65, **options).kv_groups[0].size == 64


def test_a_step_with_other_groups_than_the_model_has_is_refused(tmp_path: Path, pack_dir: Path) -> None:
    save_tiny(tmp_path, WINDOWS["gemma2"][0], **WINDOWS["gemma2"][1])
    runner = ModelRunner.load(tmp_path, dtype="float32", device="cpu", pack_dir=pack_dir, max_model_len=64)
    runner.allocate_kv(64)
    one = np.ones(1, dtype=np.int64)
    with pytest.raises(ValueError, match="StepInput has 1 KV cache groups, this model has 2"):
        runner.step(ragged_step(one * 5, one[None].astype(np.int32), one * 0, one, runner.block_size))
    options = {"dtype": "float32", "device": "cpu", "pack_dir": pack_dir, "max_model_len": 64}
    single = ModelRunner.load(tmp_path, disable_hybrid_kv_cache_manager=True, **options)
    single.allocate_kv(64)
    single.step(ragged_step(one * 5, one[None].astype(np.int32), one * 0, one, runner.block_size))
    assert single.kv_groups == (FULL,) and single.kv_spec.bytes_per_block == 2 * runner.kv_spec.bytes_per_block


def test_a_step_promises_to_others_only_what_it_computes() -> None:
    names = tuple(bytes([i]) * 16 for i in range(8))
    # A window that ends behind 7 tokens reads the last 6; the first block is in no cache any more.
    candidates = tuple(
        Candidate(arrival=i, known=known, max_chunk=99, names=names[: known - 1], hits=hits, resting=(0,))
        for i, (known, hits) in enumerate([(9, 7), (7, 0), (9, 7)])
    )
    view = next(v for v in map(draw_view, map(np.random.default_rng, range(99))) if not len(v.running))
    window = KVGroup(kind="sliding_window", size=7)
    view = replace(view, block_size=1, groups=(window,), available=50, candidates=candidates)
    decided = plan(view, SchedulerConfig(max_num_batched_tokens=24, max_num_seqs=4), find_policy("fcfs"))
    assert [(a.hits, a.count) for a in decided.admissions] == [(7, 2), (0, 7), (8, 1)]


def test_a_block_that_one_group_has_is_counted_for_whom_a_promise_lets_adopt_it() -> None:
    groups = (KVGroup(kind="chunked_local", size=4), KVGroup(kind="sliding_window", size=7))
    pool = BlockPool(num_blocks=9, block_size=1, groups=groups)
    scheduler = Scheduler(config=SchedulerConfig(async_scheduling=False), pool=pool, longest=8)
    first, second = (
        Sequence(id=str(i), prompt=np.array([3, 4, 5], dtype=np.int32), max_tokens=1, arrival=i) for i in range(2)
    )
    (block,) = pool.take(1)
    pool.publish(block, name_in(first.names_of_full_blocks(1, 1)[0], 0))  # the other group's is gone: no hit
    pool.release([block])
    scheduler.add(first)
    scheduler.add(second)
    step = scheduler.schedule()
    # The first takes six of eight. The second shares two tokens with it and takes two, and the resting block as well.
    assert step is not None and step.sequences == [first] and scheduler.refusal == "blocks"
    scheduler.check()
