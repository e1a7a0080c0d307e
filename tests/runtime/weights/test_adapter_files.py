"""An adapter's files are read whole, or refused with all that is not served, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tiny_adapters import save_adapter

from seamwise.runtime.weights.read_adapter import read_adapter

DoRA = "DoRA divides by the norm of each changed row"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    directory = tmp_path_factory.mktemp("adapter") / "a"
    save_adapter(directory, tiny_llama_dir)
    return directory


def edited(saved: Path, directory: Path, **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    written = json.loads((saved / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(written | config))
    (directory / "adapter_model.safetensors").write_bytes((saved / "adapter_model.safetensors").read_bytes())
    return directory


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_scalings_are_pefts(tmp_path: Path, tiny_llama_dir: Path, rslora: bool) -> None:
    theirs = save_adapter(
        tmp_path, tiny_llama_dir, use_rslora=rslora, r=3, lora_alpha=7, target_modules=r".*(proj)",
        rank_pattern={"v_proj": 5, r"layers\.[1-9]\.mlp\.\w+": 2}, alpha_pattern={"0.mlp.up_proj": 1, "up_proj": 32},
    )  # fmt: skip
    ours = read_adapter(tmp_path)
    layers = {name: m for name, m in theirs.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    assert len(ours.layers) == 14 and ours.layers.keys() == layers.keys() and ours.rank == 5
    for name, layer in layers.items():
        assert ours.layers[name].scaling == pytest.approx(layer.scaling["default"], rel=1e-12)
        assert torch.equal(ours.layers[name].b_NR, layer.lora_B["default"].weight)


def test_identity_is_content(saved: Path, tmp_path: Path) -> None:
    first, same = read_adapter(saved), read_adapter(edited(saved, tmp_path / "same", lora_alpha=16))
    assert len(first.digest) == 64 and first.digest == read_adapter(saved).digest != same.digest
    tensors = load_file(saved / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, edited(saved, tmp_path / "other") / "adapter_model.safetensors")
    assert read_adapter(tmp_path / "other").digest != first.digest


def test_every_key_of_peft_is_read_or_known_or_refused() -> None:
    """A key that a newer PEFT writes is refused when it is set; today's are all accounted for."""
    from seamwise.runtime.weights import read_adapter

    known = {*read_adapter._READ, *read_adapter._OF_TRAINING, *read_adapter._WHY, "bias"}
    unset = {key: value for key, value in LoraConfig().to_dict().items() if key not in known}
    assert not any(unset.values()), unset


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, f"use_dora=True: {DoRA}"),
        ({"bias": "all"}, "bias='all': biases are the model's own"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]: whole layers"),
        ({"target_parameters": ["experts.w"]}, "target_parameters=.*stacked experts"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', wanted 'LORA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changes the model's weights"),
        ({"something_new": {"a": 1}}, "something_new=.*not known here"),
        ({"r": 0}, "r is 0, wanted a number above 0"),
        ({"r": 5}, r"q_proj has ranks 4 \(lora_A\) and 4 \(lora_B\), its configuration says 5"),
        ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern is"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias=True.*; use_dora"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    saved: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_adapter(edited(saved, tmp_path / "a", **config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, DoRA),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_A: embeddings are the model's own"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias=True"),
    ],
)
def test_what_peft_saves_and_is_not_served(
    tmp_path: Path, tiny_llama_dir: Path, changes: dict[str, Any], message: str
) -> None:
    save_adapter(tmp_path, tiny_llama_dir, **changes)
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path)


def test_damaged_files_are_refused(saved: Path, tmp_path: Path) -> None:
    path = edited(saved, tmp_path / "a")
    (path / "adapter_model.safetensors").write_bytes((saved / "adapter_model.safetensors").read_bytes()[:-7])
    with pytest.raises(ValueError, match=f"adapter {path}: cannot be read: .*"):
        read_adapter(path)
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"it has adapter_model.bin, .* save it as safetensors"):
        read_adapter(path)
    tensors = load_file(saved / "adapter_model.safetensors")
    gone = next(name for name in tensors if "lora_A" in name)
    del tensors[gone]
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"lacks its lora_A\.weight"):
        read_adapter(path)
    with pytest.raises(ValueError, match=r"cannot be read: .*No such file"):
        read_adapter(tmp_path / "nowhere")
