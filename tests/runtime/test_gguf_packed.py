"""A GGUF file's Q4_0 kept packed: the values of the gguf package bit for bit, and the model that they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from quantized_checkpoints import REQUESTS, dequantized, load, logits
from test_gguf_quants import blocks
from tiny_gguf import write_gguf
from tiny_models import assert_within_budget, save_tiny

from seamwise.kernels.quantize_weight import unpack_int4
from seamwise.runtime.gguf_quants import unpack_q4_0

SIZES = {"hidden_size": 64, "intermediate_size": 96}


def save(directory: Path, kind: str = "Q4_0", architecture: str = "LlamaForCausalLM") -> tuple[Any, Path]:
    """Return transformers' model with the values of the gguf package, and the file that it was written to."""
    model = save_tiny(directory / "hf", architecture, **SIZES)
    path = directory / f"{kind}.gguf"
    write_gguf(model, path, kind)
    of = gguf.GGMLQuantizationType[kind]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(parameter.numpy(), of), of)))
    return model, path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_packed_weights_mean_the_gguf_packages_values(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    means, path = save(tmp_path, architecture=architecture)
    found = dequantized(path, dtype, quantization="gguf")
    assert len(found) == 2 * 7 + 1
    for name, weight in found.items():
        assert torch.equal(weight, means.get_parameter(name).to(dtype)), name


@pytest.mark.parametrize("entry", ["own", "transformers"])
def test_every_layer_reads_packed_weights(entry: str, tmp_path: Path) -> None:
    means, path = save(tmp_path)
    runner = load(path, torch.bfloat16, entry=entry, quantization="gguf")
    reports = {r.name: r for r in runner.program.reports}
    assert reports["stored_weights"].matched == reports["stored_weights"].expected == 15
    assert reports["quantize_linear"].expected == 8 and reports["quantize_linear"].matched == 9  # and the head
    assert not any("dequantize_weight" in str(recipe) for recipe in runner.program.recipes.values())
    assert_within_budget(logits(runner), means, REQUESTS)


def test_any_block_is_unpacked_as_the_gguf_package_does() -> None:
    raw = blocks("Q4_0", 1001)
    words, scales = unpack_q4_0(torch.from_numpy(raw).view(-1))
    with np.errstate(all="ignore"):
        wanted = gguf.dequantize(raw.reshape(-1), gguf.GGMLQuantizationType.Q4_0).reshape(-1, 32)
    got = unpack_int4(words.view(-1, 4), 32).float() * scales[:, None]
    np.testing.assert_array_equal(got.numpy(), wanted)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_kinds_that_no_kernel_reads_packed_are_named(kind: str, tmp_path: Path) -> None:
    _, path = save(tmp_path, kind)
    with pytest.raises(ValueError, match=f"wanted linear layers in Q4_0, .* this model is in {kind};"):
        load(path, torch.bfloat16, quantization="gguf")


def test_another_checkpoint_is_named(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(ValueError, match="this model is in no GGUF file"):
        load(tmp_path / "hf", torch.bfloat16, quantization="gguf")


def test_a_pack_of_packed_weights_starts_offline(tmp_path: Path, pack_dir: Path) -> None:
    _, path = save(tmp_path)
    cold = load(path, torch.bfloat16, quantization="gguf", pack_dir=pack_dir)
    warm = load(path, torch.bfloat16, quantization="gguf", pack_dir=pack_dir, offline=True)
    assert all(map(torch.equal, logits(cold), logits(warm)))
    with pytest.raises(ValueError, match="has no pack"):
        load(path, torch.bfloat16, pack_dir=pack_dir, offline=True)
