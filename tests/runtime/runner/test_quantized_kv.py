"""A KV cache in float8: by a checkpoint's scales or as it is, and what the model then means, by transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_checkpoints import LAYOUTS, REQUESTS, load, logits, save_quantized
from safetensors.torch import load_file, save_file
from shared_traces import sharing_traces
from step_inputs import Steps
from tiny_models import assert_within_budget, save_tiny
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import eager_attention_forward

from seamwise import LLM, ModelRunner
from seamwise.compile.pipeline import PipelineConfig
from seamwise.compile.startup_times import Ledger
from seamwise.runtime.build.bisect import bisect
from seamwise.runtime.build.packs import write_pack

traces = sharing_traces()

SCHEME = {
    "num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True, "actorder": None,
    "block_structure": None, "group_size": None, "observer": "minmax", "observer_kwargs": {},
}  # fmt: skip
MLA = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "q_lora_rank": 32,
    "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 48, "v_head_dim": 48, "head_dim": 16,
}  # fmt: skip
Scales = dict[str, float]


def there_and_back(x: torch.Tensor, scale: float) -> torch.Tensor:
    kept = (x.to(torch.promote_types(x.dtype, torch.float32)) / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return (kept.to(torch.promote_types(x.dtype, torch.float32)) * scale).to(x.dtype)


def cached_in_float8(model: Any, scales: Scales, turned: int = 0) -> Any:
    """Make transformers' attention read keys and values as a cache in float8 keeps them; `turned`: MLA's last columns.

    They are rounded after the rotation; a latent where its norm gives it.
    """

    def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **options: Any) -> Any:
        k_scale, v_scale = (scales.get(f"{n}.{module.layer_idx}", 1.0) for n in "kv")
        if turned:
            k = torch.cat((k[..., :-turned], there_and_back(k[..., -turned:], 1.0)), -1)
        else:
            k, v = there_and_back(k, k_scale), there_and_back(v, v_scale)
        hidden = torch.full(q.shape[2:3] * 2, float("-inf"), dtype=q.dtype).triu(1)
        return eager_attention_forward(module, q, k, v, hidden[None, None], scaling)

    for name, module in model.named_modules():
        if turned and name.endswith("kv_a_layernorm"):
            module.register_forward_hook(lambda module, inputs, latent: there_and_back(latent, 1.0))
    AttentionInterface.register("float8 cache", attend)
    model.set_attn_implementation("float8 cache")
    return model


def assert_rounded(path: Path, rounded: Any, entry: str) -> ModelRunner:
    """Hold our logits to a hundredth of what the rounding does to them, of which float32's errors are a thousandth."""
    runner = load(path, torch.float32, entry=entry, kv_cache_dtype="fp8")
    got, plain = torch.cat(logits(runner)), torch.cat(logits(load(path, torch.float32, entry=entry)))
    with torch.no_grad():
        wanted = torch.cat([rounded(torch.tensor([r]), use_cache=False).logits[0] for r in REQUESTS])
    effect = (wanted - plain).abs().max()
    assert effect > 1e-3 and (got - wanted).abs().max() < effect / 100
    return runner


def save_scaled(directory: Path, scales: Scales, dtype: torch.dtype = torch.bfloat16, **scheme: Any) -> Any:
    """Save a Llama in W8A8 with a kv_cache_scheme and scales, as llm-compressor does; return what it means."""
    means = save_quantized(directory, LAYOUTS["W8A8 int8"], dtype)
    held = load_file(directory / "model.safetensors")
    for name, scale in scales.items():
        which, _, layer = name.partition(".")
        held[f"model.layers.{layer}.self_attn.{which}_scale"] = torch.tensor([scale]).to(dtype)
    save_file(held, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = SCHEME | scheme
    (directory / "config.json").write_text(json.dumps(config))
    return means


SCALES = {"k.0": 0.0078125, "v.0": 0.00390625, "k.1": 0.01171875, "v.1": 0.0048828125}  # some keys saturate


@pytest.mark.parametrize("entry", ["own", "transformers"])
def test_a_checkpoints_scales_are_in_effect(entry: str, tmp_path: Path) -> None:
    means = save_scaled(tmp_path, SCALES)
    runner = load(tmp_path, torch.bfloat16, entry=entry)
    (report,) = [r for r in runner.program.reports if r.name == "quantize_kv"]
    assert report.matched == report.expected == 4
    assert runner.program.providers["kv_append:cpp"] == 2
    read = {n for n in runner.program.providers if n.startswith("attention")}
    assert read == {"attention_quant:composed"}, "attention and quantize, whose kernels are C++"
    assert runner.kv_spec.bytes_per_token == runner.program.kv_bytes == 2 * 2 * 2 * 64
    got = logits(runner)
    assert {cache.dtype for layer in runner.kv_caches for cache in layer} == {torch.float8_e4m3fn}
    assert_within_budget(got, cached_in_float8(means, SCALES), REQUESTS)


def test_the_older_names_of_scales_are_read(tmp_path: Path) -> None:
    save_scaled(tmp_path, SCALES)
    wanted = logits(load(tmp_path, torch.bfloat16))
    held = load_file(tmp_path / "model.safetensors")
    older = {re.sub(r"self_attn\.(.)_scale", r"self_attn.\1_proj.output_scale", n): t for n, t in held.items()}
    assert older.keys() != held.keys()
    save_file(older, tmp_path / "model.safetensors")
    assert all(map(torch.equal, logits(load(tmp_path, torch.bfloat16)), wanted))


@pytest.mark.parametrize("entry", ["own", "transformers"])
def test_without_scales_keys_and_values_are_rounded_as_they_are(entry: str, tmp_path: Path) -> None:
    means = save_tiny(tmp_path, "Qwen3ForCausalLM", head_dim=32)
    runner = assert_rounded(tmp_path, cached_in_float8(means, {}), entry)
    assert runner.program.providers["kv_append:cpp"] == runner.program.providers["attention:cpp"] == 2


def test_the_cache_holds_what_the_scale_divides(tmp_path: Path) -> None:
    """Bit for bit: the first layer's keys and values of the first request, from transformers' own projections."""
    seen: dict[str, torch.Tensor] = {}
    means = save_scaled(tmp_path, SCALES, torch.float32)
    runner = load(tmp_path, torch.float32)
    logits(runner)

    def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **options: Any) -> Any:
        seen.setdefault("k", k[0]), seen.setdefault("v", v[0])
        return eager_attention_forward(module, q, k, v, None, scaling)

    AttentionInterface.register("seen", attend)
    means.set_attn_implementation("seen")
    with torch.no_grad():
        means(torch.tensor([REQUESTS[0]]), use_cache=False)
    block = Steps(REQUESTS, block_size=runner.block_size).next({0: 9})["block_table"][0, 0]
    for name, cache in zip("kv", runner.kv_caches[0], strict=True):
        wanted = (seen[name] / SCALES[f"{name}.0"]).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(cache[block, :, :9].float(), wanted.float()), name
    assert float(wanted.float().abs().max()) > 100


@pytest.mark.parametrize("entry", ["own", "transformers"])
def test_latents_are_cached_in_float8(entry: str, tmp_path: Path) -> None:
    means = save_tiny(tmp_path, "DeepseekV3ForCausalLM", **MLA)
    runner = assert_rounded(tmp_path, cached_in_float8(means, {}, turned=16 if entry == "own" else 0), entry)
    assert runner.kv_spec.bytes_per_token == (2 * 48 if entry == "own" else 2 * 2 * 4 * 64)


def test_every_rewrite_over_a_scaled_cache_is_valid(tmp_path: Path) -> None:
    save_scaled(tmp_path, SCALES)
    program = load(tmp_path, torch.bfloat16, pipeline=PipelineConfig(validate=True)).program
    certificates = {r.name: r.certificate for r in program.reports if r.certificate is not None}
    assert "fuse_attention_quant" in certificates
    assert all(c["max_error"] < 1e-9 for n, c in certificates.items() if n != "quantize_linear")


def test_a_pack_keeps_the_cache_dtype_and_its_scales(tmp_path: Path) -> None:
    pack_dir = tmp_path / "packs"  # others may have packed the same model
    save_tiny(tmp_path / "model", "LlamaForCausalLM")
    cold = load(tmp_path / "model", torch.bfloat16, pack_dir=pack_dir, kv_cache_dtype="fp8")
    warm = load(tmp_path / "model", torch.bfloat16, pack_dir=pack_dir, kv_cache_dtype="fp8", offline=True)
    assert all(map(torch.equal, logits(cold), logits(warm)))
    with pytest.raises(ValueError, match="has no pack"):
        load(tmp_path / "model", torch.bfloat16, pack_dir=pack_dir, offline=True)
    write_pack(tmp_path / "model", tmp_path / "pack", Ledger(), dtype="bfloat16", device="cpu", kv_cache_dtype="fp8")
    named = ModelRunner.load(tmp_path / "pack", offline=True)
    assert named.kv_spec.dtype == torch.float8_e4m3fn and all(map(torch.equal, logits(cold), logits(named)))


def test_bisect_runs_on_a_scaled_cache(tmp_path: Path) -> None:
    save_scaled(tmp_path, SCALES, torch.float32)
    a, b = "entry=own", "entry=transformers,run=meaning"
    assert bisect(tmp_path, a, b, case="decode of 3 requests", tolerance=1e-4).first is None


def test_twice_the_blocks_fit(tmp_path: Path) -> None:
    save_tiny(tmp_path, "LlamaForCausalLM")
    plain, float8 = (
        LLM(tmp_path, dtype="bfloat16", device="cpu", pack_dir=None, kv_cache_memory_bytes=1 << 20, kv_cache_dtype=d)
        for d in ("auto", "fp8")
    )
    assert float8.engine.runner.num_blocks == 2 * plain.engine.runner.num_blocks


@pytest.mark.parametrize("given", ["fp8_e5m2", "float8", None, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(given: Any, tmp_path: Path) -> None:
    save_tiny(tmp_path, "LlamaForCausalLM")
    with pytest.raises(ValueError, match=r"kv_cache_dtype=.*wanted one of 'auto', 'fp8', 'fp8_e4m3'"):
        load(tmp_path, torch.bfloat16, kv_cache_dtype=given)


@pytest.mark.parametrize(
    "change",
    [
        {"type": "int"}, {"num_bits": 4}, {"dynamic": True}, {"symmetric": False}, {"strategy": "channel"},
        {"group_size": 64}, {"shape": [1]},
    ],
)  # fmt: skip
def test_schemes_without_kernel_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    save_scaled(tmp_path, SCALES, **change)
    with pytest.raises(ValueError, match=r"kv_cache_scheme: .*(is not served; wanted|would be ignored)"):
        load(tmp_path, torch.bfloat16)


def test_scales_that_are_missing_are_named_with_a_scheme_and_without(tmp_path: Path) -> None:
    save_scaled(tmp_path, {name: scale for name, scale in SCALES.items() if name != "v.1"})
    with pytest.raises(ValueError, match=r"missing model\.layers\.1\.self_attn\.v_scale, shape \(1,\)"):
        load(tmp_path, torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"missing model\.layers\.1\.self_attn\.v_scale, shape \(1,\)"):
        load(tmp_path, torch.bfloat16, kv_cache_dtype="fp8")
