"""Mixtures of experts, multi-head latent attention, MXFP4 and Phi-3 from GGUF files: the logits of transformers."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_families import encode_all, write_family
from hypothesis import given, settings
from hypothesis import strategies as st
from step_inputs import Steps, whole
from tiny_models import assert_within_budget, reference, save_tiny

from seamwise import ModelRunner, StepInput
from seamwise.runtime.build.model_config import ModelConfig
from seamwise.runtime.weights.file_formats import find_tensors
from seamwise.runtime.weights.gguf.config import read_gguf_config
from seamwise.runtime.weights.gguf.weights import read_gguf

REQUESTS = [list(range(3, 25)), [9, 8, 7]]
LATENTS = {
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 2, "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5, "num_key_value_heads": 4, "num_hidden_layers": 3,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
    "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
DEEPSEEK_YARN = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}
GROUPS = {"n_group": 4, "topk_group": 1}  # of which the two best experts need not be
V2: dict[str, Any] = LATENTS | GROUPS | {"q_lora_rank": None, "topk_method": "group_limited_greedy"}
GPT_OSS = {
    "head_dim": 16, "sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 64,
    "intermediate_size": 64, "rope_parameters": YARN | {"rope_theta": 150000.0, "truncate": False},
}  # fmt: skip
QWEN_MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
PHI3_LONG = {
    "rope_parameters": LONG | {"short_factor": [1.0 + 0.1 * i for i in range(6)],
                               "long_factor": [2.0 + 0.5 * i for i in range(6)]},
    "original_max_position_embeddings": 64, "sliding_window": 6,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "intermediate_size": 64, "rope_parameters": {
        "rope_type": "default", "rope_theta": 50000.0}}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", QWEN_MOE | {"shared_expert_intermediate_size": 96}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", QWEN_MOE | {"head_dim": 16, "norm_topk_prob": True}),
    "phi3": ("Phi3ForCausalLM", {"tie_word_embeddings": True}),
    "phi3-longrope": ("Phi3ForCausalLM", PHI3_LONG),
    "gpt-oss": ("GptOssForCausalLM", GPT_OSS),
    "deepseek-v2": ("DeepseekV2ForCausalLM", V2 | {"rope_parameters": DEEPSEEK_YARN}),
    "deepseek-v3": ("DeepseekV3ForCausalLM", LATENTS | GROUPS | {"q_lora_rank": 24, "rope_parameters": DEEPSEEK_YARN}),
}  # fmt: skip


def load(path: Path, **options: Any) -> ModelRunner:
    options = {"dtype": "float32", "max_model_len": 64} | options
    return ModelRunner.load(path, device="cpu", pack_dir=None, disable_hybrid_kv_cache_manager=True, **options)


def logits(runner: ModelRunner) -> torch.Tensor:
    steps = Steps(REQUESTS, block_size=runner.block_size)
    runner.allocate_kv(steps.num_blocks)
    return runner.step(StepInput(**steps.next(whole(REQUESTS)[0]))).logits


def save(directory: Path, which: str, **options: Any) -> tuple[Any, Path]:
    architecture, changes = MODELS[which]
    (directory / "hf").mkdir()
    model = save_tiny(directory / "hf", architecture, **changes)
    write_family(model, directory / "tiny.gguf", **options)
    return model, directory / "tiny.gguf"


@pytest.mark.parametrize("which", MODELS)
def test_logits_are_those_of_the_model_that_was_converted(which: str, tmp_path: Path) -> None:
    model, path = save(tmp_path, which)
    runner = load(path)
    assert runner.config.architecture == MODELS[which][0] and runner.config.dtype == torch.float32
    torch.testing.assert_close(logits(runner), torch.cat(reference(model, REQUESTS)), atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("experts", ["apart", "fused"])
@pytest.mark.parametrize(("which", "kind"), [("mixtral", "F32"), ("qwen3-moe", "Q4_K"), ("deepseek-v3", "Q8_0")])
def test_experts_apart_and_fused_are_those_that_are_stacked(
    which: str, kind: str, experts: str, tmp_path: Path
) -> None:
    """llama.cpp's converter stacked none before 2024, and since 2026 may put gate and up into one tensor."""
    architecture, changes = MODELS[which]
    (tmp_path / "hf").mkdir()
    model = save_tiny(
        tmp_path / "hf",
        architecture,
        **changes | ({"hidden_size": 256, "moe_intermediate_size": 256} if kind == "Q4_K" else {}),
    )
    found, configs = [], []
    for form in ("stacked", experts):
        write_family(model, tmp_path / f"{form}.gguf", kinds={"_exps": kind}, experts=form)
        configs.append(read_gguf_config(tmp_path / f"{form}.gguf"))
        found.append(read_gguf(tmp_path / f"{form}.gguf"))
    assert configs[0] == configs[1] and found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert torch.equal(tensor.load(), found[1][name].load()), name
        for end, packed in tensor.packed.items():
            assert torch.equal(packed.load(), found[1][name].packed[end].load()), name
    names = [n for n in found[0] if ".experts." in n]
    assert len(names) == 3 * len({n.rpartition(".experts.")[0] for n in names}) * model.config.num_local_experts


def test_transformers_own_classes_read_the_same_file(tmp_path: Path) -> None:
    """Their names for DeepSeek's parameters are the ones that files are read by."""
    model, path = save(tmp_path, "deepseek-v3")
    got = logits(load(path, entry="transformers"))
    torch.testing.assert_close(got, torch.cat(reference(model, REQUESTS)), atol=3e-5, rtol=1e-5)


def test_latents_of_older_files_are_expanded_by_one_matrix(tmp_path: Path) -> None:
    """One more difference: such a file says nothing of groups, and llama.cpp chose among all experts then."""
    (tmp_path / "hf").mkdir()
    among_all = V2 | {"topk_method": "greedy", "n_group": 1, "topk_group": 1}
    model = save_tiny(tmp_path / "hf", "DeepseekV2ForCausalLM", **among_all)
    write_family(model, tmp_path / "tiny.gguf", older=True)
    with pytest.warns(UserWarning, match="says nothing of groups of experts"):
        runner = load(tmp_path / "tiny.gguf")
    assert runner.config.raw["n_group"] == 1
    torch.testing.assert_close(logits(runner), torch.cat(reference(model, REQUESTS)), atol=3e-5, rtol=1e-5)


def test_prompts_beyond_the_original_length_take_the_long_factors(tmp_path: Path) -> None:
    model, path = save(tmp_path, "phi3-longrope")
    requests = [[i % 90 + 3 for i in range(100)]]  # transformers chooses by the longest request
    runner = load(path, max_model_len=128)
    steps = Steps(requests, block_size=runner.block_size)
    runner.allocate_kv(steps.num_blocks)
    got = runner.step(StepInput(**steps.next(whole(requests)[0]))).logits
    torch.testing.assert_close(got, torch.cat(reference(model, requests)), atol=3e-5, rtol=1e-5)


def as_stored(model: Any, gate: str, up: str | None = None, down: str | None = None) -> None:
    """Give a model's experts the values that a file holds of them, in these kinds; in gate's where none is given."""
    transposed = model.config.model_type == "gpt_oss"  # blocks lie along columns
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                parts = (parameter.transpose(1, 2) if transposed else parameter).chunk(2 if "up" in name else 1, 1)
                kinds = (gate, up or gate) if "up" in name else (down or gate,)
                read = torch.cat([stored(p, kind) for p, kind in zip(parts, kinds, strict=True)], 1)
                parameter.copy_(read.transpose(1, 2) if transposed else read)


def stored(values: torch.Tensor, kind: str) -> torch.Tensor:
    raw = encode_all(values.contiguous().numpy(), kind).reshape(-1)
    return torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType[kind]).reshape(values.shape))


@pytest.mark.parametrize(
    ("which", "kind", "warned"),
    [("gpt-oss", "MXFP4", False), ("mixtral", "Q8_0", True), ("qwen3-moe", "MXFP4", True),
     ("qwen2-moe", "F16", False)],
)  # fmt: skip
def test_experts_in_blocks_mean_the_gguf_packages_values(which: str, kind: str, warned: bool, tmp_path: Path) -> None:
    """gpt-oss's in MXFP4 stay as they are; others are dequantized, and a warning says what they take."""
    architecture, changes = MODELS[which]
    (tmp_path / "hf").mkdir()
    model = save_tiny(tmp_path / "hf", architecture, **changes)
    write_family(model, tmp_path / "tiny.gguf", kinds={"_exps": kind})
    as_stored(model, kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner = load(tmp_path / "tiny.gguf")
    assert any("experts are dequantized at load" in str(w.message) for w in caught) is warned
    packed = [name for name in runner.program.parameters if name.endswith("_blocks")]
    assert len(packed) == (4 if (which, kind) == ("gpt-oss", "MXFP4") else 0)
    torch.testing.assert_close(logits(runner), torch.cat(reference(model, REQUESTS)), atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("which", "kinds", "kept"),
    [("mixtral", ("Q4_0", "Q4_0", "Q4_0"), 4), ("qwen2-moe", ("Q4_1", "Q4_1", "Q8_0"), 4),
     ("qwen3-moe", ("Q4_K", "Q4_K", "Q6_K"), 4), ("qwen3-moe", ("Q4_K", "Q6_K", "Q4_K"), 2)],
)  # fmt: skip
def test_experts_stay_packed(which: str, kinds: tuple[str, str, str], kept: int, tmp_path: Path) -> None:
    """As in files of mixed kinds; where gate and up are in two, both are dequantized, with the warning."""
    architecture, changes = MODELS[which]
    (tmp_path / "hf").mkdir()
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256} if kinds[0] == "Q4_K" else {}
    sizes["num_experts_per_tok"] = changes.get("num_experts", 4)  # all: bfloat16 may choose other ones than float64
    model = save_tiny(tmp_path / "hf", architecture, **changes | sizes)
    write_family(
        model, tmp_path / "tiny.gguf", kinds=dict(zip(("gate_exps", "up_exps", "down_exps"), kinds, strict=True))
    )
    as_stored(model, *kinds)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner = load(tmp_path / "tiny.gguf", dtype="bfloat16", quantization="gguf")
    warned = [str(w.message) for w in caught if "experts are dequantized at load" in str(w.message)]
    assert len(warned) == (kept < 4) and runner.program.providers["grouped_linear_int:cpp"] == kept
    assert sum("dequantize_weight" in str(r) for r in runner.program.recipes.values()) == 0
    model.config._experts_implementation = "batched_mm"  # which runs in float64 too
    assert_within_budget([logits(runner)], model, REQUESTS)


def test_a_mixture_keeps_its_layers_packed(tmp_path: Path) -> None:
    """With quantization="gguf": attention, experts, the head; not what expands latents, which is in two.

    In float32 no kernel reads experts so, and they are dequantized.
    """
    architecture, changes = MODELS["deepseek-v3"]
    (tmp_path / "hf").mkdir()
    sizes = {"moe_intermediate_size": 32, "intermediate_size": 96, "q_lora_rank": 32, "vocab_size": 96}
    model = save_tiny(tmp_path / "hf", architecture, **changes | sizes)
    write_family(model, tmp_path / "tiny.gguf", "Q8_0", kinds={"attn_k_b": "F32", "attn_v_b": "F32"})
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "mlp.gate." not in name and "kv_b_proj" not in name:
                stored = gguf.dequantize(encode_all(p.numpy(), "Q8_0").reshape(-1), gguf.GGMLQuantizationType.Q8_0)
                p.copy_(torch.from_numpy(stored.reshape(p.shape)))
    with pytest.warns(UserWarning, match="experts are dequantized at load"):
        runner = load(tmp_path / "tiny.gguf", quantization="gguf")
    held = [name for name in runner.program.parameters if name.endswith("_packed")]
    assert len(held) == 3 * 4 + 3 + 2 * (2 + 3) + 1  # attention; the dense layer; experts and shared ones; the head
    (report,) = [r for r in runner.program.reports if r.name == "quantize_experts"]
    assert [m.reason.partition(" weights ")[0] for m in report.misses] == ["no kernel reads int8"] * 4
    torch.testing.assert_close(logits(runner), torch.cat(reference(model, REQUESTS)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("which", ["deepseek-v3", "gpt-oss", "phi3-longrope", "qwen2-moe"])
def test_no_damage_to_a_header_does_more_than_raise_value_error(
    which: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    _, path = save(tmp_path_factory.mktemp("model"), which, kinds={"_exps": "MXFP4"})
    content = path.read_bytes()

    @settings(max_examples=30)
    @given(
        flips=st.lists(st.tuples(st.integers(0, content.index(b"blk.1")), st.integers(1, 255)), min_size=1, max_size=3)
    )
    def flipped(flips: list[tuple[int, int]]) -> None:
        damaged = bytearray(content)
        for i, bits in flips:
            damaged[i] ^= bits
        path.write_bytes(damaged)
        with suppress(ValueError), warnings.catch_warnings(action="ignore"):
            ModelConfig.from_directory(path)
        with suppress(ValueError):
            read_gguf(path)

    flipped()


def test_pieces_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "deepseek2")
    for part, shape in {"attn_k_b": (4, 32, 16), "attn_v_b": (4, 16, 31)}.items():
        writer.add_tensor(f"blk.0.{part}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"a.gguf: .*k_b_proj.weight \(4, 32, 16\), .*v_b_proj.* are no pieces of"):
        read_gguf(path)


def test_parts_are_one_file(tmp_path: Path) -> None:
    """As large models are published. Any part may be named; every one is wanted."""
    model, whole = save(tmp_path, "mixtral", tokenizer={"ggml.model": "gpt2"})
    parts = tmp_path / "parts"
    parts.mkdir()
    write_family(model, parts / "tiny.gguf", parts_of=6, tokenizer={"ggml.model": "gpt2"})
    files = sorted(parts.iterdir())
    assert [file.name for file in files] == [f"tiny-0000{i}-of-00004.gguf" for i in range(1, 5)]
    wanted = read_gguf(whole)
    for path in (parts, files[0], files[2]):
        assert ModelConfig.from_directory(path).raw == ModelConfig.from_directory(whole).raw
        found, problems, _ = find_tensors(path, "auto")
        assert not problems and found.keys() == wanted.keys()
        assert all(torch.equal(found[name].load(), wanted[name].load()) for name in wanted)
    (parts / "another.gguf").write_bytes(files[0].read_bytes())
    with pytest.raises(ValueError, match=r"another.gguf says that it is split.no 0 of 4, its name 0 of 1;"):
        read_gguf(parts / "another.gguf")
    kept = files[2].read_bytes()
    files[2].write_bytes(files[1].read_bytes())
    with pytest.raises(ValueError, match=r"00003-of-00004.gguf says that it is split.no 1 of 4, its name 2 of 4;"):
        read_gguf(files[0])
    files[2].unlink()
    with pytest.raises(ValueError, match=r"00001-of-00004.gguf: .* No such file .*tiny-00003-of-00004.gguf"):
        read_gguf(files[0])
    files[2].write_bytes(kept[:-1])
    with pytest.raises(ValueError, match="the end of the file: it is truncated"):
        read_gguf(files[0])
