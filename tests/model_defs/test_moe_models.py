"""Mixtures of experts give transformers' logits, from either layout of their checkpoints, compiled or not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import draw_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_families import MOE, loaded_moe, poisoned_caches, run_moe, tiny_moe
from safetensors.torch import load_file, save_file
from step_inputs import Steps, run_runner, whole
from tiny_models import SIZES, assert_within_budget, load_tiny, reference, save_tiny

from seamwise import ModelRunner
from seamwise.compile.pipeline import PipelineConfig
from seamwise.model_defs import build_model

ENTRIES = ("own", "transformers")
ONE_EACH = [name for name in MOE if "," not in name]
PASSES = ("raise_rms_norm", "raise_rope", "raise_swiglu", "fuse_add_rms_norm", "fuse_gate_up", "fuse_qkv")
# Of two layers, in DeepSeek's the first with a plain MLP: norms, of them those of latents; rotated tensors, where they
# are halves; gated MLPs, dense and shared; norms of residual sums; gate-up pairs; joined projections.
MATCHES = {
    "mixtral": (5, 4, 0, 4, 0, 2),
    "qwen3_moe": (9, 4, 0, 4, 0, 2),
    "deepseek_v2": (9, 0, 2, 4, 2, 2),
    "deepseek_v2, groups, no query latent": (7, 0, 2, 4, 2, 0),  # one projection has a bias and the other has none
    "deepseek_v3": (9, 0, 2, 4, 2, 2),
    "gpt_oss": (5, 4, 0, 4, 0, 2),
}

ONE_TABLE: dict[str, Any] = {"disable_hybrid_kv_cache_manager": True}  # the steps here have one block table


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("family", MOE)
def test_prefill_decode_and_mix_give_transformers_logits(family: str, entry: str) -> None:
    requests = draw_tokens(0, 19, 1, 7, 60)
    theirs = tiny_moe(family)[0]
    mix = [{0: 5, 3: 16}, {1: 1, 3: 1, 0: 1, 2: 3}, {2: 1, 0: 13, 3: 1}, {3: 42, 2: 3}]
    for asked, schedule in ((requests, whole(requests)), (requests, mix), (requests[2:3], [{0: 1}] * 7)):
        got = run_moe(family, entry, asked, schedule, num_padding=1)
        assert_within_budget(got, copy.deepcopy(theirs), asked)


@settings(max_examples=20, deadline=None)
@given(
    data=st.data(), family=st.sampled_from(sorted(MOE)), block_size=st.sampled_from([1, 4, 16]),
    num_padding=st.integers(0, 3), seed=st.integers(0, 3),
)  # fmt: skip
def test_any_batch_composition(data: Any, family: str, block_size: int, num_padding: int, seed: int) -> None:
    requests = draw_tokens(seed, *data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4)))
    left = {r: len(tokens) for r, tokens in enumerate(requests)}
    schedule = []
    while left:
        chosen = data.draw(st.lists(st.sampled_from(sorted(left)), min_size=1, unique=True))
        step = {r: data.draw(st.integers(1, left[r])) for r in chosen}
        left = {r: n - step.get(r, 0) for r, n in left.items() if n > step.get(r, 0)}
        schedule.append(step)
    got = run_moe(family, "own", requests, schedule, block_size=block_size, num_padding=num_padding, seed=seed)
    assert_within_budget(got, copy.deepcopy(tiny_moe(family)[0]), requests)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("family", ONE_EACH)
def test_greedy_text_is_transformers(family: str, entry: str) -> None:
    (prompt,) = draw_tokens(2, 9)
    want = list(prompt)
    for _ in range(16):
        want.append(int(reference(tiny_moe(family)[0], [want])[0][-1].argmax()))
    model, config = loaded_moe(family, entry)
    got = prompt + [0] * 16
    steps = Steps([got])
    caches = poisoned_caches(config, entry, steps)
    for count in (len(prompt), *[1] * 15):
        with torch.no_grad():
            logits = model(kv_caches=caches, **steps.next({0: count}))
        got[steps.computed[0]] = int(logits[-1].argmax())
    assert got == want


@pytest.mark.parametrize("family", MOE)
def test_both_entries_have_transformers_parameters(family: str) -> None:
    wanted = {name: tensor.shape for name, tensor in tiny_moe(family)[0].state_dict().items()}
    for entry in ENTRIES:
        assert {name: t.shape for name, t in loaded_moe(family, entry)[0].state_dict().items()} == wanted


@pytest.mark.parametrize("family", ONE_EACH)
def test_stacked_checkpoints_load_as_well(family: str, tmp_path: Path) -> None:
    theirs, apart = tiny_moe(family)
    theirs.save_pretrained(tmp_path, save_original_format=False)
    named = [n for n in load_file(tmp_path / "model.safetensors") if ".experts." in n]
    assert all(not any(part.isdigit() for part in n.partition(".experts.")[2].split(".")) for n in named)
    first, second = (dict(load_tiny(path, "own")[0].state_dict()) for path in (apart, tmp_path))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def run_compiled(runner: ModelRunner, requests: list[list[int]]) -> list[torch.Tensor]:
    """Return the logits of a chunked mix, then of recorded decode steps."""
    decode = {0: 1, 1: 1, 2: 1}
    return run_runner(runner, requests, ({0: 6, 2: 31}, {1: 2, 0: 10, 2: 1}, decode, decode, {0: 1, 1: 1}))


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("family", MATCHES)
def test_compiled_it_keeps_its_promises(family: str, entry: str) -> None:
    theirs, directory = tiny_moe(family)
    options = {"entry": entry, "pack_dir": None, "pipeline": PipelineConfig(validate=True)}
    runner = ModelRunner.load(directory, dtype=torch.float32, device="cpu", **options, **ONE_TABLE)
    counts = {r.name: (r.matched, r.expected) for r in runner.program.reports}
    wanted = dict(zip(PASSES, MATCHES[family], strict=True))
    if (family, entry) == ("gpt_oss", "transformers"):  # whose rotation is another arithmetic
        wanted["raise_rope"] = 0
    assert {name: counts[name] for name in PASSES} == {name: (n, n) for name, n in wanted.items()}
    # Our definitions call their routers by name; of transformers' those with groups have arithmetic of their own.
    routers = {"mixtral": 2, "qwen3_moe": 2, "gpt_oss": 2, "deepseek_v2": 1}
    assert counts["raise_moe"][0] == (0 if entry == "own" else routers.get(family, 0))
    requests = draw_tokens(4, 19, 5, 34)
    assert_within_budget(run_compiled(runner, requests), copy.deepcopy(theirs), requests)


@pytest.mark.parametrize("family", MATCHES)
def test_in_bfloat16_most_rows_are_as_near_as_transformers(family: str) -> None:
    """Rounding may choose another expert for a token, and then its row is far off: the median row is held."""
    theirs, directory = tiny_moe(family)
    runner = ModelRunner.load(directory, dtype=torch.bfloat16, device="cpu", pack_dir=None, **ONE_TABLE)
    requests = draw_tokens(4, 19, 5, 34)
    got = torch.cat(run_compiled(runner, requests))
    same, exact = (torch.cat(reference(copy.deepcopy(theirs).to(d), requests)) for d in (got.dtype, torch.float64))
    error, usual = ((x - exact).abs().amax(-1).median() for x in (got, same))
    assert error <= 2 * (usual + torch.finfo(got.dtype).eps * exact.abs().max())


def test_it_comes_back_from_a_pack(pack_dir: Path) -> None:
    theirs, directory = tiny_moe("deepseek_v3")
    requests = draw_tokens(4, 19, 5, 34)
    for offline in (False, True):
        runner = ModelRunner.load(
            directory, dtype=torch.float32, device="cpu", pack_dir=pack_dir, offline=offline, **ONE_TABLE
        )
        assert_within_budget(run_compiled(runner, requests), copy.deepcopy(theirs), requests)


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("mixtral", {"num_local_experts": None}, "num_experts is missing"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("qwen3_moe", {"mlp_only_layers": "all"}, "mlp_only_layers is 'all', wanted a list"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob and mlp_bias must be false"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2, wanted 1"),
        ("gpt_oss", {"quantization_config": {"quant_method": "gptq"}}, "quant_method is 'gptq'"),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, "MXFP4 has blocks of 32"),
    ],
)
def test_what_the_equations_do_not_cover_is_refused(family: str, changes: dict[str, Any], named: str) -> None:
    architecture, raw = MOE[family]
    with pytest.raises(ValueError, match=named):
        build_model(architecture, SIZES | raw | changes, entry="own")


def dequantized(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return what MXFP4 means, by its table of 16 values: (E, N, G, 16) bytes and (E, N, G) exponents -> (E, N, K)."""
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values = torch.tensor([*magnitudes, *(-m for m in magnitudes)])
    floats = torch.stack((values[(packed & 15).long()], values[(packed >> 4).long()]), -1).flatten(-2)
    return (floats * torch.exp2(scale.float() - 127).unsqueeze(-1)).flatten(-2)


def test_gpt_oss_reads_its_experts_in_mxfp4(tmp_path: Path) -> None:
    changes = MOE["gpt_oss"][1] | {"intermediate_size": 32, "num_local_experts": 3}
    theirs = save_tiny(tmp_path, "GptOssForCausalLM", **changes)
    stored, generator = load_file(tmp_path / "model.safetensors"), torch.Generator().manual_seed(0)
    for layer in range(2):
        for name, rows, columns in (("gate_up_proj", 64, 64), ("down_proj", 64, 32)):
            prefix = f"model.layers.{layer}.mlp.experts.{name}"
            packed = torch.randint(256, (3, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
            scale = torch.randint(122, 126, (3, rows, columns // 32), generator=generator, dtype=torch.uint8)
            stored |= {f"{prefix}_blocks": packed, f"{prefix}_scales": scale}
            theirs.get_parameter(prefix).data = dequantized(packed, scale).transpose(1, 2)
            del stored[prefix]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    requests = draw_tokens(4, 19, 5, 34)
    runner = ModelRunner.load(tmp_path, dtype=torch.float32, device="cpu", pack_dir=None, **ONE_TABLE)
    assert runner.program.providers["grouped_mxfp4_linear:torch"] == 4
    assert_within_budget(run_compiled(runner, requests), theirs, requests)
    dummy = ModelRunner.load(
        tmp_path, dtype=torch.float32, device="cpu", pack_dir=None, load_format="dummy", **ONE_TABLE
    )
    assert all(torch.isfinite(part).all() for part in run_compiled(dummy, requests))
    with pytest.raises(ValueError, match="only Seamwise's own definition reads experts in MXFP4"):
        ModelRunner.load(tmp_path, device="cpu", pack_dir=None, entry="transformers")


def test_gpt_oss_slides_in_every_other_layer_from_the_first() -> None:
    raw = SIZES | MOE["gpt_oss"][1] | {"num_hidden_layers": 3}
    model = build_model("GptOssForCausalLM", raw, entry="own")
    assert [model.get_submodule(f"model.layers.{i}.self_attn").window for i in range(3)] == [5, 0, 5]
