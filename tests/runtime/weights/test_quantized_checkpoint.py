"""Checkpoints published quantized: dequantized bit for bit, and served within the budget of the model they mean."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from older_transformers import compared_with_5_23
from quantized_checkpoints import (
    LAYOUTS,
    REQUESTS,
    UNSERVED,
    dequantized,
    load,
    logits,
    pack,
    save_quantized,
)  # fmt: skip
from safetensors.torch import load_file, save_file
from shared_traces import sharing_traces
from tiny_models import assert_within_budget

from seamwise.bench.step import decode_batch
from seamwise.compile.pipeline import PipelineConfig
from seamwise.kernels import dequantize_weight
from seamwise.runtime.build.bisect import bisect

traces = sharing_traces()


@pytest.mark.parametrize(("name", "dtype"), zip([*LAYOUTS, *UNSERVED], cycle([torch.float32, torch.bfloat16])), ids=str)
def test_dequantized_weights_are_the_formats(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    means = save_quantized(tmp_path, (LAYOUTS | UNSERVED)[name], dtype)
    found = dequantized(tmp_path, dtype)
    assert len(found) == 14
    for parameter, weight in found.items():
        wanted = means.get_parameter(parameter)
        assert weight.dtype == dtype and torch.equal(weight, wanted), parameter


@pytest.mark.parametrize(
    ("name", "entry"),
    [*((n, "own") for n in LAYOUTS), *((n, "transformers") for n in ("fp8 blocks", "W8A8 int8 static", "W4A16_ASYM"))],
)
def test_every_layer_reads_the_stored_weights(name: str, entry: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    means = save_quantized(tmp_path, layout, torch.bfloat16)
    runner = load(tmp_path, torch.bfloat16, entry=entry)
    reports = {r.name: r for r in runner.program.reports}
    assert reports["stored_weights"].matched == reports["stored_weights"].expected == 14
    assert reports["quantize_linear"].matched == reports["quantize_linear"].expected == 8
    if layout.inputs:
        assert reports["fuse_add_rms_norm_quant"].matched == reports["fuse_add_rms_norm_quant"].expected == 3
    assert not any("dequantize_weight" in str(recipe) for recipe in runner.program.recipes.values())
    packed = layout.kind != "int8" or not layout.inputs  # int8 products are torch's
    assert {n: c for n, c in runner.program.providers.items() if "linear_int" in n or "scaled" in n} == (
        {"linear_int:cpp": 8} if packed else {"scaled_linear:torch_scaled_mm": 8}
    )
    assert not any(n.endswith(":torch") for n in runner.program.providers)
    assert_within_budget(logits(runner), means, REQUESTS)
    if layout.kind == "float8" and entry == "own":  # transformers' has ops of torch between them
        runner.step(decode_batch(runner, 1, 20))
        calls = [name for name, *_ in runner.recording(1).graph.profile()]
        assert "torch" not in calls and calls.count("seamwise_quantize") == 8, "a decode step is kernels alone"


MOE = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "mlp_only_layers": [0],
    "norm_topk_prob": True,
}  # fmt: skip
DEEPSEEK = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "q_lora_rank": 128,
    "kv_lora_rank": 128, "qk_rope_head_dim": 16, "qk_nope_head_dim": 48, "v_head_dim": 48, "head_dim": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("fp8 blocks", "own"), ("fp8 blocks", "transformers"), ("W8A8 int8", "own"), ("W4A16", "transformers"),
        ("W8A16 groups", "own"),
    ],
)  # fmt: skip
def test_experts_read_the_stored_weights(name: str, entry: str, tmp_path: Path) -> None:
    means = save_quantized(tmp_path, LAYOUTS[name], torch.float32, "Qwen3MoeForCausalLM", **MOE)
    runner = load(tmp_path, torch.float32, entry=entry)
    reports = {r.name: r for r in runner.program.reports}
    assert reports["stored_weights"].matched == 13
    served, missed = reports["quantize_experts"].matched, reports["quantize_experts"].misses
    format = {"W4A16": "int4", "W8A16 groups": "int8"}.get(name)
    assert (served, len(missed)) == ((0, 2) if format else (2, 0))
    assert all(f"no kernel reads {format} weights of these experts: x must be bfloat16" in m.reason for m in missed)
    assert runner.program.providers.get("grouped_linear_int:cpp", 0) == (2 if name == "fp8 blocks" else 0)
    found = dequantized(tmp_path, torch.float32, entry)
    for parameter in ("gate_up_proj", "down_proj"):
        parameter = f"model.layers.1.mlp.experts.{parameter}"
        assert torch.equal(found[parameter], means.get_parameter(parameter).flatten(0, 1))
    assert_within_budget(logits(runner), means, REQUESTS)


@pytest.mark.parametrize(
    ("name", "entry"),
    [("W4A16_ASYM", "own"), ("W4A16_ASYM", "transformers"), ("W8A16 groups", "own")],
)
def test_experts_integers_stay_packed(name: str, entry: str, tmp_path: Path) -> None:
    means = save_quantized(tmp_path, LAYOUTS[name], torch.bfloat16, "Qwen3MoeForCausalLM", **MOE)
    runner = load(tmp_path, torch.bfloat16, entry=entry)
    (report,) = [r for r in runner.program.reports if r.name == "quantize_experts"]
    assert (report.matched, report.misses) == (2, []) and runner.program.providers["grouped_linear_int:cpp"] == 2
    assert not any("dequantize_weight" in str(recipe) for recipe in runner.program.recipes.values())
    assert_within_budget(logits(runner), means, REQUESTS)


def test_zero_points_of_experts_fill_their_words(tmp_path: Path) -> None:
    save_quantized(tmp_path, LAYOUTS["W4A16_ASYM"], torch.bfloat16, "Qwen3MoeForCausalLM", **MOE)
    config = json.loads((tmp_path / "config.json").read_text()) | {"moe_intermediate_size": 132}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"experts of 132 rows in .* words of zero points that divide the rows"):
        load(tmp_path, torch.bfloat16)


@pytest.mark.parametrize("entry", ["own", "transformers"])
def test_deepseeks_blocks_are_read(entry: str, tmp_path: Path) -> None:
    means = save_quantized(tmp_path, LAYOUTS["fp8 blocks"], torch.float32, "DeepseekV3ForCausalLM", **DEEPSEEK)
    found = dequantized(tmp_path, torch.float32, entry)
    assert len(found) == 2 * 5 + 3 + 3 + 2
    for parameter, weight in found.items():
        assert torch.equal(weight, means.get_parameter(parameter).view(weight.shape)), parameter
    for layer in means.model.layers:  # absorbed by our definition, of four dimensions in transformers': not rewritten
        layer.self_attn.kv_b_proj._forward_pre_hooks.clear()
    assert_within_budget(logits(load(tmp_path, torch.float32, entry=entry)), means, REQUESTS)


def test_experts_stored_in_two_ways_are_refused(tmp_path: Path) -> None:
    layout = replace(LAYOUTS["W8A8 int8"], ignore=("lm_head", "re:.*experts.2.*"))
    save_quantized(tmp_path, layout, torch.float32, "Qwen3MoeForCausalLM", **MOE)
    with pytest.raises(ValueError, match=r"experts of model\.layers\.1\.mlp\.experts are not all"):
        load(tmp_path, torch.float32)


@pytest.mark.parametrize("name", UNSERVED)
def test_a_form_without_kernel_keeps_the_dequantized_weight_and_says_why(name: str, tmp_path: Path) -> None:
    means = save_quantized(tmp_path, UNSERVED[name], torch.float32)
    runner = load(tmp_path, torch.float32)
    (report,) = [r for r in runner.program.reports if r.name == "quantize_linear"]
    assert report.matched == report.expected == 0
    assert len(report.misses) == 8 and all("have no kernel" in miss.reason for miss in report.misses)
    for module in means.modules():
        module._forward_pre_hooks.clear()  # a layer that keeps its dequantized weight keeps its input too
    assert_within_budget(logits(runner), means, REQUESTS)


@pytest.mark.parametrize("name", ["fp8 blocks", "FP8", "W4A16_ASYM", "experts"])
def test_every_rewrite_over_stored_weights_is_valid(name: str, tmp_path: Path) -> None:
    of_experts = ("Qwen3MoeForCausalLM", MOE) if name == "experts" else ("LlamaForCausalLM", {})
    layout = LAYOUTS.get(name, LAYOUTS["W4A16_ASYM"])
    save_quantized(tmp_path, layout, torch.bfloat16, of_experts[0], **of_experts[1])
    program = load(tmp_path, torch.bfloat16, pipeline=PipelineConfig(validate=True)).program
    certificates = {r.name: r.certificate for r in program.reports if r.certificate is not None}
    assert "fuse_silu_mul_quant" in certificates
    assert all(c["max_error"] < 1e-9 for n, c in certificates.items() if n != "quantize_linear")


@compared_with_5_23("wants blocks in another form")
def test_block_weights_are_transformers(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    save_quantized(tmp_path, LAYOUTS["fp8 blocks"], torch.bfloat16)
    held = load_file(tmp_path / "model.safetensors")
    for parameter, weight in dequantized(tmp_path, torch.bfloat16, entry="transformers").items():
        theirs = Fp8Dequantize(None).convert(
            {"weight": held[parameter], "weight_scale_inv": held[f"{parameter}_scale_inv"]}
        )["weight"]
        assert torch.equal(weight, theirs.to(torch.bfloat16)), parameter


@pytest.mark.parametrize("name", ["W8A8 int8", "W4A16_ASYM"])
def test_weights_are_rounded_as_their_scales_are_stored(name: str, tmp_path: Path) -> None:
    """What compressed-tensors decompresses has the scales' dtype, whatever the model runs in."""
    means = save_quantized(tmp_path, LAYOUTS[name], torch.bfloat16)
    for parameter, weight in dequantized(tmp_path, torch.float32).items():
        assert torch.equal(weight, means.get_parameter(parameter).float()), parameter


def test_packed_weights_are_compressed_tensors() -> None:
    """Golden words of pack_to_int32 and their dequantization, compressed-tensors 0.20.0."""
    values = torch.tensor([[-8, -7, -1, 0, 1, 6, 7, 3, 5, -2]], dtype=torch.int8)
    packed = torch.tensor([[-1075214576, 109]], dtype=torch.int32)
    zero = torch.tensor([[-3]], dtype=torch.int8)
    scale = torch.tensor([[0.0371]], dtype=torch.bfloat16)
    plain = dequantize_weight(packed, scale, zero, "int4", 1, 0, 10, torch.bfloat16)
    assert torch.equal(pack(values), packed)
    wanted = [-5, -4, 2, 3, 4, 9, 10, 6, 8, 1]
    assert plain.tolist() == [[n * 0.037109375 for n in wanted]]


def test_joined_layers_quantize_their_input_with_the_largest_scale(tmp_path: Path) -> None:
    save_quantized(tmp_path, LAYOUTS["FP8"], torch.bfloat16)
    held = load_file(tmp_path / "model.safetensors")
    scales = {f"model.layers.0.self_attn.{n}_proj.input_scale": float(i) for i, n in enumerate("kqv", 1)}
    save_file(held | {n: torch.full((1,), s).bfloat16() for n, s in scales.items()}, tmp_path / "model.safetensors")

    def read(**options: Any) -> list[float]:
        weights = load(tmp_path, torch.bfloat16, **options).executable.weights
        return sorted(float(w) for w in weights if w.shape == (1,) and float(w) in (1, 2, 3))

    assert read() == [3]
    apart = PipelineConfig(disabled=("fuse_qkv",), allow_missed=("fuse_add_rms_norm_quant",))
    assert read(pipeline=apart) == [1, 2, 3]


def test_layers_that_are_left_out_stay_as_they_are(tmp_path: Path) -> None:
    """The second layer's MLP by a pattern, the first one's value projection by name: it is joined with no other."""
    layout = replace(
        LAYOUTS["FP8_DYNAMIC"], ignore=("lm_head", "re:.*layers.1.mlp.*", "model.layers.0.self_attn.v_proj")
    )
    means = save_quantized(tmp_path, layout, torch.bfloat16)
    runner = load(tmp_path, torch.bfloat16)
    reports = {r.name: r for r in runner.program.reports}
    assert reports["stored_weights"].matched == 10
    # qk, o, gate_up and down of the first layer, qkv and o of the second
    assert (reports["quantize_linear"].matched, reports["quantize_linear"].misses) == (6, [])
    assert_within_budget(logits(runner), means, REQUESTS)


def test_missing_extra_and_misshapen_tensors_are_one_error(tmp_path: Path) -> None:
    save_quantized(tmp_path, LAYOUTS["W4A16_ASYM"], torch.bfloat16)
    held, at = load_file(tmp_path / "model.safetensors"), "model.layers.1.mlp."
    held.pop(f"{at}up_proj.weight_zero_point")
    held[f"{at}gate_proj.weight_scale"] = held[f"{at}gate_proj.weight_scale"][:, :2].contiguous()
    held[f"{at}down_proj.weight_g_idx"] = torch.zeros(384, dtype=torch.int32)
    held[f"{at}down_proj.weight_packed"] = held[f"{at}down_proj.weight_packed"].float()
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="4 problems") as error:
        load(tmp_path, torch.bfloat16)
    for problem in (
        f"missing {at}up_proj.weight_zero_point, shape (48, 4)", f"shape of {at}gate_proj.weight_scale is (384, 2)",
        f"extra {at}down_proj.weight_g_idx", f"dtype of {at}down_proj.weight_packed is F32, wanted int32",
    ):  # fmt: skip
        assert problem in str(error.value)


def test_a_plain_checkpoint_is_not_read_as_a_quantized_one(tmp_path: Path) -> None:
    save_quantized(tmp_path, LAYOUTS["FP8_DYNAMIC"], torch.bfloat16)
    held = load_file(tmp_path / "model.safetensors")
    save_file({n: t.to(torch.bfloat16) for n, t in held.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="weight is BF16, wanted float8_e4m3fn"):
        load(tmp_path, torch.bfloat16)


def test_a_pack_starts_offline_and_its_key_knows_the_quantization(tmp_path: Path) -> None:
    pack_dir = tmp_path / "packs"  # others may have packed the same model
    save_quantized(tmp_path, LAYOUTS["W8A8 int8 static"], torch.bfloat16)
    cold = load(tmp_path, torch.bfloat16, pack_dir=pack_dir)
    warm = load(tmp_path, torch.bfloat16, pack_dir=pack_dir, offline=True)
    assert all(map(torch.equal, logits(cold), logits(warm)))
    edited = json.loads((tmp_path / "config.json").read_text())
    edited["quantization_config"]["ignore"].append("model.layers.0.mlp.up_proj")
    (tmp_path / "config.json").write_text(json.dumps(edited))
    with pytest.raises(ValueError, match="has no pack"):
        load(tmp_path, torch.bfloat16, pack_dir=pack_dir, offline=True)


@pytest.mark.parametrize("name", ["fp8 blocks", "W4A16_ASYM", "W8A8 int8 static"])
def test_dummy_weights_have_the_stored_forms(name: str, tmp_path: Path) -> None:
    save_quantized(tmp_path, LAYOUTS[name], torch.bfloat16)
    (tmp_path / "model.safetensors").unlink()
    assert all(part.isfinite().all() for part in logits(load(tmp_path, torch.bfloat16, load_format="dummy")))


def test_quantizing_twice_is_refused(tmp_path: Path) -> None:
    save_quantized(tmp_path, LAYOUTS["FP8_DYNAMIC"], torch.bfloat16)
    with pytest.raises(ValueError, match="quantization='int8': the checkpoint is quantized already"):
        load(tmp_path, torch.bfloat16, quantization="int8")


def test_bisect_reads_stored_weights(tmp_path: Path) -> None:
    save_quantized(tmp_path, LAYOUTS["W4A16_ASYM"], torch.float32)
    a, b = "entry=own", "entry=transformers,run=meaning,without=all"
    assert bisect(tmp_path, a, b, case="decode of 3 requests", tolerance=1e-4).first is None
