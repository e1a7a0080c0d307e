"""What is saved is what is loaded, bit for bit, by Seamwise and by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import Tiny, draw, load, on_meta
from torch import Tensor, nn

from seamwise.runtime import save as save_module
from seamwise.runtime.checkpoint import load_weights
from seamwise.runtime.checkpoint_safetensors import read_safetensors
from seamwise.runtime.save import save_tensors, save_weights


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def odd_values(dtype: torch.dtype) -> Tensor:
    values = [float("nan"), float("-inf"), -0.0, torch.finfo(dtype).smallest_normal / 2, torch.finfo(dtype).max, 1 / 3]
    return torch.tensor(values * 4, dtype=dtype).view(6, 4)


@pytest.mark.parametrize("max_shard_bytes", [1, 100, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_bit_comes_back(dtype: torch.dtype, max_shard_bytes: int, tmp_path: Path) -> None:
    module = Tiny().to(dtype)
    with torch.no_grad():
        module.head.weight.copy_(odd_values(dtype))
    save_weights(module, tmp_path / "new", max_shard_bytes=max_shard_bytes)
    loaded = load(tmp_path / "new", dtype=dtype)
    for name, parameter in module.named_parameters():
        assert torch.equal(bits(loaded.get_parameter(name)), bits(parameter))
    sharded = (tmp_path / "new" / "model.safetensors.index.json").exists()
    assert sharded == (max_shard_bytes < 1 << 30) == (not (tmp_path / "new" / "model.safetensors").exists())
    for shard in (tmp_path / "new").glob("*.safetensors"):
        tensors = read_safetensors(shard)
        size = sum(t.load().nbytes for t in tensors.values())
        assert size <= max_shard_bytes or len(tensors) == 1


def test_tied_parameters_are_written_once(tmp_path: Path) -> None:
    save_weights(Tiny(tied=True), tmp_path)
    assert sorted(read_safetensors(tmp_path / "model.safetensors")) == ["embed.weight", "norm.bias", "norm.weight"]
    module = load(tmp_path, on_meta(tied=True))
    assert module.get_parameter("head.weight") is module.get_parameter("embed.weight")


def test_views_of_one_storage_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    tensors = {"whole": base, "rows": base[1:3], "turned": base.T, "strided": base[:, ::2]}
    save_tensors(tensors, tmp_path)
    for name, stored in read_safetensors(tmp_path / "model.safetensors").items():
        assert torch.equal(stored.load(), tensors[name])


def test_transformers_loads_what_is_saved(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    config.save_pretrained(tmp_path)
    save_weights(model, tmp_path, max_shard_bytes=4000)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)


def test_nothing_is_overwritten_and_nothing_without_values_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"embed\.weight is on the meta device"):
        save_weights(on_meta(), tmp_path)
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        save_weights(Tiny(), tmp_path, max_shard_bytes=0)
    assert not list(tmp_path.iterdir())
    save_tensors(draw(), tmp_path)
    with pytest.raises(ValueError, match=r"holds model\.safetensors already"):
        save_tensors(draw(), tmp_path)


def test_a_save_that_stops_half_way_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = save_module._write, []

    def stops(tensors: dict[str, Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise OSError("No space left on device")
        write(tensors, path)

    monkeypatch.setattr(save_module, "_write", stops)
    with pytest.raises(OSError, match="No space left"):
        save_tensors(draw(), tmp_path, max_shard_bytes=1)
    with pytest.raises(ValueError, match=r"holds 2 files \*\.safetensors .* and no model\.safetensors\.index\.json"):
        load(tmp_path)


def test_the_index_counts_every_byte(tmp_path: Path) -> None:
    save_tensors(draw(), tmp_path, max_shard_bytes=1)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * (24 + 4 + 4 + 24) and set(index["weight_map"]) == set(draw())


def test_the_saved_module_need_not_be_the_loaded_one(tmp_path: Path) -> None:
    linear = nn.Linear(3, 2)
    save_weights(linear, tmp_path)
    with torch.device("meta"):
        other = nn.Linear(3, 2)
    load_weights(other, tmp_path, dtype=torch.float32, device="cpu")
    assert torch.equal(other.weight, linear.weight) and torch.equal(other.bias, linear.bias)
