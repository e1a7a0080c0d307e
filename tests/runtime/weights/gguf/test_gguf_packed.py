"""A GGUF file's integers kept packed: the values of the gguf package, and the model that they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from quantized_checkpoints import REQUESTS, dequantized, load, logits
from shared_traces import sharing_traces
from test_gguf_quants import blocks
from tiny_gguf import encode, write_gguf
from tiny_models import assert_within_budget, save_tiny

from seamwise.kernels import dequantize_weight
from seamwise.runtime.weights.gguf.quants import KINDS, PACKED

traces = sharing_traces()
SIZES = {"hidden_size": 64, "intermediate_size": 96}


def save(
    directory: Path, kind: str = "Q4_0", architecture: str = "LlamaForCausalLM", *, tied: bool = False, **kinds: str
) -> tuple[Any, Path]:
    """Return transformers' model with the values of the gguf package, and the file that it was written to.

    kinds  of matrices that are not in `kind`, by their module's own name
    """
    sizes = SIZES | ({"hidden_size": 256, "intermediate_size": 512} if kind.endswith("K") else {})
    model = save_tiny(directory / "hf", architecture, tie_word_embeddings=tied, **sizes)
    path = directory / f"{kind}.gguf"
    names = {name: kinds.get(name.split(".")[-2], kind) for name, p in model.named_parameters() if p.dim() > 1}
    write_gguf(model, path, kind, kinds=names)
    with torch.no_grad():
        for name, one in names.items():
            parameter, of = model.get_parameter(name), gguf.GGMLQuantizationType[one]
            parameter.copy_(torch.from_numpy(gguf.dequantize(encode(parameter.numpy(), one), of)))
    return model, path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("architecture", "kind"), [("Qwen2ForCausalLM", "Q4_0"), *(("LlamaForCausalLM", kind) for kind in PACKED)]
)
def test_packed_weights_mean_the_gguf_packages_values(
    architecture: str, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    means, path = save(tmp_path, kind, architecture)
    found = dequantized(path, dtype, quantization="gguf")
    assert len(found) == 2 * 7 + 1
    for name, weight in found.items():
        wanted = means.get_parameter(name).to(dtype)
        if PACKED[kind].has_offset:  # 8 scales and a minimum are one offset, rounded once more in float32
            torch.testing.assert_close(weight, wanted, rtol=torch.finfo(dtype).eps, atol=1e-7)
        else:
            assert torch.equal(weight, wanted), name


@pytest.mark.parametrize(
    ("entry", "kind"), [("transformers", "Q4_0"), ("transformers", "Q8_0"), *(("own", kind) for kind in PACKED)]
)
def test_every_layer_reads_packed_weights(entry: str, kind: str, tmp_path: Path) -> None:
    means, path = save(tmp_path, kind)
    runner = load(path, torch.bfloat16, entry=entry, quantization="gguf")
    reports = {r.name: r for r in runner.program.reports}
    assert reports["stored_weights"].matched == reports["stored_weights"].expected == 15
    assert reports["quantize_linear"].matched == reports["quantize_linear"].expected == 9  # the head, too
    assert runner.program.providers["linear_int:cpp"] == 9
    assert not any("dequantize_weight" in str(recipe) for recipe in runner.program.recipes.values())
    assert_within_budget(logits(runner), means, REQUESTS)


@pytest.mark.parametrize("entry", ["own", "transformers"])
def test_a_tied_head_reads_the_embeddings_integers(entry: str, tmp_path: Path) -> None:
    """As in the demo model's file: layers in Q4_1, the embedding in Q8_0. Its rows are gathered dequantized."""
    means, path = save(tmp_path, "Q4_1", tied=True, embed_tokens="Q8_0")
    runner = load(path, torch.bfloat16, entry=entry, quantization="gguf")
    reports = {r.name: r for r in runner.program.reports}
    assert reports["stored_weights"].matched == reports["stored_weights"].expected == 15
    assert reports["quantize_linear"].matched == 9 and not reports["quantize_linear"].misses
    plain = [r for r in runner.program.recipes.values() if "dequantize_weight" in str(r)]
    assert len(plain) == 1 and "model.embed_tokens.weight_packed" in str(plain)
    assert_within_budget(logits(runner), means, REQUESTS)


@pytest.mark.parametrize("kinds", [("Q4_K", "Q6_K"), ("Q4_0", "Q4_1")])
def test_layers_of_two_kinds_are_joined_by_kind_and_keep_their_kernels(kinds: tuple[str, str], tmp_path: Path) -> None:
    """As in files of mixed kinds, where values are in a wider one than queries and keys."""
    means, path = save(tmp_path, kinds[0], v_proj=kinds[1])
    runner = load(path, torch.bfloat16, quantization="gguf")
    (report,) = [r for r in runner.program.reports if r.name == "quantize_linear"]
    assert (report.matched, report.misses) == (11, [])  # qk, v, o, gate_up and down of two layers, and the head
    assert_within_budget(logits(runner), means, REQUESTS)


@pytest.mark.parametrize("kind", PACKED)
def test_any_block_is_unpacked_as_the_gguf_package_does(kind: str) -> None:
    raw, form = blocks(kind, 1001), PACKED[kind]
    stored, scale, *offset = (part.view(len(raw), -1) for part in form.parts(torch.from_numpy(raw)))
    with np.errstate(all="ignore"):
        wanted = gguf.dequantize(raw.reshape(-1), gguf.GGMLQuantizationType[kind]).reshape(len(raw), -1)
    zero = offset[0] if offset else None
    got = dequantize_weight(stored, scale, zero, form.format, 1, form.group, KINDS[kind].block, torch.float32).numpy()
    if zero is None:
        np.testing.assert_array_equal(got, wanted)
    else:
        finite = scale.isfinite().all(1).numpy() & zero.isfinite().all(1).numpy()
        largest = (16 * scale.abs() + zero.abs()).repeat_interleave(form.group, 1).numpy()
        assert finite.sum() > 900 and (abs(got - wanted) <= 2.0**-22 * largest)[finite].all()


@pytest.mark.parametrize("kind", ["Q5_1", "F16"])
def test_kinds_that_no_kernel_reads_packed_are_named(kind: str, tmp_path: Path) -> None:
    _, path = save(tmp_path, kind)
    with pytest.raises(ValueError, match=rf"wanted linear layers in Q4_0, Q4_1, .* this model is in {kind};"):
        load(path, torch.bfloat16, quantization="gguf")


def test_another_checkpoint_is_named(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(ValueError, match="this model is in no GGUF file"):
        load(tmp_path / "hf", torch.bfloat16, quantization="gguf")


def test_a_pack_of_packed_weights_starts_offline(tmp_path: Path) -> None:
    pack_dir = tmp_path / "packs"  # others may have packed the same model
    _, path = save(tmp_path)
    cold = load(path, torch.bfloat16, quantization="gguf", pack_dir=pack_dir)
    warm = load(path, torch.bfloat16, quantization="gguf", pack_dir=pack_dir, offline=True)
    assert all(map(torch.equal, logits(cold), logits(warm)))
    with pytest.raises(ValueError, match="has no pack"):
        load(path, torch.bfloat16, pack_dir=pack_dir, offline=True)
