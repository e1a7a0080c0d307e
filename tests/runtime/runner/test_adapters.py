"""Rows with adapters are PEFT's, rows without are the base model's in bits, in one batch, recorded or not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from shared_traces import sharing_traces
from step_inputs import Steps
from tiny_adapters import ALL, logits_of, save_adapter
from tiny_models import save_tiny

from seamwise import ModelRunner
from seamwise.runtime.build.step import StepInput
from seamwise.runtime.runner.adapter_slots import NotWritten
from seamwise.runtime.runner.recordings import Full
from seamwise.runtime.weights.read_adapter import read_adapter

traces = sharing_traces()

REQUESTS = [[(7 * i + r) % 90 + 3 for i in range(n)] for r, n in enumerate((5, 21, 4, 18))]
STEPS = ({0: 4, 2: 3, 1: 20}, {3: 17, 0: 1, 2: 1, 1: 1}, {3: 1})


def run(runner: ModelRunner, slots: dict[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return all logits of the requests, each with the adapter of a slot, chunked and mixed."""
    steps = Steps(REQUESTS, block_size=runner.block_size)
    runner.allocate_kv(steps.num_blocks)
    rows: list[list[torch.Tensor]] = [[] for _ in REQUESTS]
    for step in STEPS:
        batch = StepInput(**steps.next(step))
        if slots:
            batch = replace(batch, adapter_slots=torch.tensor([slots.get(r, 0) for r in step], dtype=torch.int32))
        for request, part in zip(step, runner.step(batch).logits.clone().split(list(step.values())), strict=True):
            rows[request].append(part)
    return [torch.cat(parts) for parts in rows]


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapted") / "model"
    save_tiny(directory, "LlamaForCausalLM")
    return directory


def test_a_first_step_is_recorded(model: Path, pack_dir: Path) -> None:
    """What kernels keep for ever is not taken from the memory of a recording."""
    from seamwise.kernels.cpu import lora_cpu

    runner = ModelRunner.load(model, device="cpu", enable_lora=True, pack_dir=pack_dir)
    steps = Steps(REQUESTS, block_size=runner.block_size)
    runner.allocate_kv(steps.num_blocks)
    lora_cpu._ends.cache_clear()
    runner.step(StepInput(**steps.next({0: 1, 1: 1})))
    assert runner.recording_stats.steps["full"] == 1


ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {},
    "rslora, q and v": {"use_rslora": True, "target_modules": ["q_proj", "v_proj"], "r": 3},
    "patterns by regex": {
        "target_modules": r".*\.(1\.mlp\.up_proj|self_attn\.o_proj|k_proj)", "r": 2,
        "rank_pattern": {"k_proj": 5, r"layers\.1\.self_attn\.o_proj": 8}, "alpha_pattern": {"up_proj": 3},
    },
}  # fmt: skip


@pytest.mark.parametrize("cudagraph_mode", ["none", "full_and_piecewise"])
def test_each_row_has_its_own_adapter(model: Path, tmp_path: Path, pack_dir: Path, cudagraph_mode: str) -> None:
    """Three adapters and none in one batch; then one slot is given to another adapter, and recordings see it."""
    runner = ModelRunner.load(
        model, device="cpu", enable_lora=True, max_loras=2, max_lora_rank=8, pack_dir=pack_dir,
        cudagraph_mode=cudagraph_mode,
    )  # fmt: skip
    reports = {r.name: r for r in runner.program.reports}
    assert reports["add_adapters"].matched == 2 * 4  # joined q, k, v; o; joined gate, up; down
    assert [m.reason for m in reports["add_adapters"].misses] == [
        "its rows are not the step's tokens, each of which has an adapter"
    ]
    plain = ModelRunner.load(model, device="cpu", pack_dir=pack_dir, cudagraph_mode=cudagraph_mode)
    base = run(plain, {}, torch.float32)
    theirs = {}
    for i, (name, config) in enumerate(ADAPTERS.items()):
        theirs[name] = logits_of(save_adapter(tmp_path / name, model, seed=i, **config), REQUESTS)
    digest = runner.weights_digest()
    assert digest == plain.weights_digest()
    for first, second in (("all", "rslora, q and v"), ("patterns by regex", "rslora, q and v")):
        for slot, name in ((1, first), (2, second)):
            runner.set_adapter(slot, read_adapter(tmp_path / name))
        got = run(runner, {1: 1, 2: 2, 3: 1}, torch.float32)
        assert torch.equal(got[0], base[0]), "a row without an adapter is the base model's in bits"
        for r, name in ((1, first), (2, second), (3, first)):
            close(got[r], theirs[name][r])
            assert float((got[r] - base[r]).abs().max()) > 0.05 * float(base[r].abs().max()), "the adapter does nothing"
    assert all(map(torch.equal, run(runner, {}, torch.float32), base))
    runner.set_adapter(1, None)
    with pytest.raises(ValueError, match=r"adapter_slots names 1; slots that hold an adapter: 2"):
        run(runner, {0: 1}, torch.float32)
    assert runner.weights_digest() == digest, "adapters are no weights of the model"


def test_a_step_without_adapters_does_not_compute_any(model: Path, tmp_path: Path, pack_dir: Path) -> None:
    """It is recorded apart from one of its size with adapters, and as few kernels run as in the model without them."""
    runner = ModelRunner.load(model, device="cpu", enable_lora=True, max_loras=1, max_lora_rank=8, pack_dir=pack_dir)
    plain = ModelRunner.load(model, device="cpu", pack_dir=pack_dir)
    save_adapter(tmp_path / "a", model)
    runner.set_adapter(1, read_adapter(tmp_path / "a"))
    steps = Steps(REQUESTS, block_size=runner.block_size)
    batch = StepInput(**steps.next({0: 1, 1: 1}))
    of_one = replace(batch, adapter_slots=torch.tensor([0, 1], dtype=torch.int32))
    logits = []
    for made, step in ((plain, batch), (runner, batch), (runner, of_one), (runner, batch)):
        if not made.num_blocks:
            made.allocate_kv(steps.num_blocks)
        logits.append(made.step(step).logits.clone())
    assert runner.recording_stats.recorded == [Full(2), Full(2, adapters=True)]
    kernels = [made._recordings[key].graph.num_kernels for made, key in ((plain, Full(2)), (runner, Full(2)))]
    assert kernels[0] == kernels[1] == runner._recordings[Full(2, adapters=True)].graph.num_kernels - 2 * 4 * 2
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[1], logits[3])
    assert torch.equal(logits[0][0], logits[2][0]) and not torch.equal(logits[0][1], logits[2][1])


def test_rows_equal_merged_weights_within_the_budget(model: Path, tmp_path: Path, pack_dir: Path) -> None:
    """bfloat16: the error against float64 of merged weights is at most twice a merged bfloat16 model's."""
    theirs = save_adapter(tmp_path / "a", model, seed=3)
    merged = theirs.merge_and_unload()
    exact = logits_of(merged.double(), REQUESTS)
    merged.to(torch.bfloat16).save_pretrained(tmp_path / "merged")
    runner = ModelRunner.load(model, device="cpu", dtype="bfloat16", enable_lora=True, max_loras=1, pack_dir=pack_dir)
    runner.set_adapter(1, read_adapter(tmp_path / "a"))
    ours = run(runner, dict.fromkeys(range(4), 1), torch.bfloat16)
    plain = ModelRunner.load(tmp_path / "merged", device="cpu", dtype="bfloat16", pack_dir=pack_dir)
    same = run(plain, {}, torch.bfloat16)
    for got, near, far in zip(ours, same, exact, strict=True):
        budget = 2 * ((near - far).abs().max() + torch.finfo(torch.bfloat16).eps * far.abs().max())
        assert float((got - far).abs().max()) <= float(budget)


@pytest.mark.parametrize(
    ("architecture", "entry", "changes", "modules"),
    [
        ("Phi3ForCausalLM", "own", {}, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
        ("Qwen2ForCausalLM", "own", {}, ALL),
        ("Qwen3ForCausalLM", "own", {"head_dim": 16}, ALL),
        ("LlamaForCausalLM", "transformers", {}, ALL),
        ("MixtralForCausalLM", "own", {"num_local_experts": 4, "num_experts_per_tok": 2}, ALL[:4]),
    ],
)
def test_families(
    tmp_path: Path, pack_dir: Path, architecture: str, entry: str, changes: dict[str, Any], modules: Any
) -> None:
    save_tiny(tmp_path / "m", architecture, **changes)
    theirs = save_adapter(tmp_path / "a", tmp_path / "m", target_modules=list(modules))
    runner = ModelRunner.load(tmp_path / "m", device="cpu", entry=entry, enable_lora=True, pack_dir=pack_dir)
    runner.set_adapter(1, read_adapter(tmp_path / "a"))
    wanted = logits_of(theirs, REQUESTS)
    got = run(runner, {1: 1, 2: 1, 3: 1}, torch.float32)
    for r in (1, 2, 3):
        close(got[r], wanted[r])
    with theirs.disable_adapter():
        close(got[0], logits_of(theirs, REQUESTS[:1])[0])


def test_validated_and_quantized(model: Path, tmp_path: Path) -> None:
    """Weight-only quantization goes with adapters; every pass is validated with the adapters' input in place."""
    from seamwise.compile.pipeline import PipelineConfig

    save_adapter(tmp_path / "a", model)
    options: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16"}
    runner = ModelRunner.load(
        model, enable_lora=True, quantization="w4a16", pipeline=PipelineConfig(validate=True), **options
    )
    base = run(ModelRunner.load(model, quantization="w4a16", **options), {}, torch.bfloat16)
    runner.set_adapter(1, read_adapter(tmp_path / "a"))
    got = run(runner, {1: 1}, torch.bfloat16)
    assert torch.equal(got[0], base[0]) and not torch.equal(got[1], base[1])


def test_adapters_come_back_after_sleep(model: Path, tmp_path: Path, pack_dir: Path) -> None:
    from safetensors.torch import load_file

    save_adapter(tmp_path / "a", model)
    runner = ModelRunner.load(model, device="cpu", enable_lora=True, max_lora_rank=4, pack_dir=pack_dir)
    runner.set_adapter(1, read_adapter(tmp_path / "a"))
    before = run(runner, {1: 1, 3: 1}, torch.float32)
    for level in (1, 2):
        runner.sleep(level)
        with pytest.raises(RuntimeError, match="asleep"):
            runner.set_adapter(1, None)
        runner.wake()
        if level == 2:
            runner.update_weights(load_file(model / "model.safetensors").items())
        assert all(map(torch.equal, run(runner, {1: 1, 3: 1}, torch.float32), before))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_loras": 2}, "max_loras and max_lora_rank need enable_lora=True"),
        ({"enable_lora": True, "max_loras": 0}, "max_loras=0: wanted 1 to"),
        ({"enable_lora": True, "max_lora_rank": 1000}, "max_lora_rank=1000: wanted 1 to 512"),
        (
            {"enable_lora": True, "quantization": "int8"},
            "quantization='int8': it quantizes the rows that adapters read",
        ),
        *(
            ({"enable_lora": True, **ranks}, "over the ranks of tensor_parallel_size alone")
            for ranks in ({"pipeline_parallel_size": 2}, {"data_parallel_size": 2, "enable_expert_parallel": True})
        ),
        (
            {"enable_lora": True, "tensor_parallel_size": 2, "enable_sequence_parallel": True, "enable_async_tp": True},
            "enable_lora with enable_async_tp, which takes linear layers together",
        ),
    ],
)
def test_options_are_in_effect_or_refused(model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelRunner.load(model, device="cpu", **options)


def test_what_does_not_fit_is_refused_whole(model: Path, tmp_path: Path, pack_dir: Path) -> None:
    save_adapter(tmp_path / "a", model, r=6)
    adapter = read_adapter(tmp_path / "a")
    with pytest.raises(ValueError, match="loaded without adapters; give it enable_lora=True"):
        ModelRunner.load(model, device="cpu", pack_dir=pack_dir).set_adapter(1, adapter)
    runner = ModelRunner.load(model, device="cpu", enable_lora=True, max_lora_rank=4, pack_dir=pack_dir)
    wrong = replace(adapter, layers=dict(adapter.layers) | {"model.embed_tokens": next(iter(adapter.layers.values()))})
    with pytest.raises(ValueError, match=r"q_proj has rank 6, max_lora_rank=4; raise it.*and \d+ more") as error:
        runner.set_adapter(1, wrong)
    assert str(error.value).count(";") >= 12 and runner.adapters.held == {}
    with pytest.raises(ValueError, match="adapter slot 2: wanted 1 to 1"):
        runner.set_adapter(2, None)


def test_what_fails_half_way_leaves_nothing_in_its_slot(model: Path, tmp_path: Path, pack_dir: Path) -> None:
    """The next adapter there has fewer layers: what the failed one wrote, or the one before it, would be seen."""
    options: dict[str, Any] = {"device": "cpu", "enable_lora": True, "max_lora_rank": 8, "pack_dir": pack_dir}
    for name, config in (("all", {}), ("few", {"target_modules": ["q_proj"]})):
        save_adapter(tmp_path / name, model, **config)
    every, few = (read_adapter(tmp_path / name) for name in ("all", "few"))
    clean, runner = (ModelRunner.load(model, **options) for _ in range(2))
    clean.set_adapter(1, few)
    wanted = run(clean, {1: 1}, torch.float32)
    last = "model.layers.1.mlp.down_proj"
    torn = replace(every, layers=dict(every.layers) | {last: replace(every.layers[last], b_NR=torch.ones(64, 3))})
    for before in (None, every):
        runner.set_adapter(1, before)
        with pytest.raises(NotWritten, match=r"adapter slot 1: RuntimeError: .*size"):
            runner.set_adapter(1, torn)
        assert runner.adapters.held == {}
        runner.set_adapter(1, few)
        assert all(map(torch.equal, run(runner, {1: 1}, torch.float32), wanted))
