"""The runner's weights from every load_format, and sizes that no machine has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import WRITERS, save

from seamwise import LLM, SamplingParams
from seamwise.runtime.build.model_config import ModelConfig
from seamwise.runtime.build.runner_config import RunnerConfig


def ids(directory: Path, pack_dir: Path, **options: Any) -> list[int]:
    llm = LLM(directory, dtype="float32", device="cpu", max_num_seqs=2, pack_dir=pack_dir, **options)
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    return llm.generate({"prompt_token_ids": [5, 6, 7]}, greedy)[0].outputs[0].token_ids


@pytest.mark.parametrize("format", ["pt", "npz"])
@pytest.mark.parametrize("load_format", ["auto", None])
def test_other_formats_give_the_ids_of_safetensors(
    format: str, load_format: str | None, tiny_llama_dir: Path, tmp_path: Path, pack_dir: Path
) -> None:
    assert format in WRITERS
    shutil.copy(tiny_llama_dir / "config.json", tmp_path)
    save(tmp_path, load_file(tiny_llama_dir / "model.safetensors"), format)
    assert ids(tmp_path, pack_dir, load_format=load_format or format) == ids(tiny_llama_dir, pack_dir)


def test_dummy_weights_need_no_more_than_a_configuration(tiny_llama_dir: Path, tmp_path: Path, pack_dir: Path) -> None:
    shutil.copy(tiny_llama_dir / "config.json", tmp_path)
    first, again, other = (ids(tmp_path, pack_dir, load_format="dummy", seed=s) for s in (1, 1, 2))
    assert first == again != other
    with pytest.raises(ValueError, match="has no checkpoint"):
        ids(tmp_path, pack_dir)


def test_a_model_that_no_memory_holds_is_refused(tiny_llama_dir: Path, tmp_path: Path, pack_dir: Path) -> None:
    config = json.loads((tiny_llama_dir / "config.json").read_text())
    config["intermediate_size"] = 1 << 24
    config["hidden_size"] = 1 << 13
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"GB of weights in torch\.float32, cpu has \d+\.\d GB of memory"):
        ids(tmp_path, pack_dir, load_format="dummy")


@pytest.mark.parametrize("load_format", ["bin", "bitsandbytes", "", None, 3])
def test_an_unknown_format_is_named_before_anything_is_compiled(load_format: Any, tiny_llama_dir: Path) -> None:
    config = ModelConfig.from_directory(tiny_llama_dir)
    with pytest.raises(ValueError, match=rf"load_format={load_format!r}: wanted one of 'auto', .*, 'dummy'"):
        RunnerConfig.for_model(config, device="cpu", load_format=load_format)


def test_torch_is_not_asked_for_code(tiny_llama_dir: Path, tmp_path: Path, pack_dir: Path) -> None:
    """A state dict with an object in it is refused, whatever its class."""
    shutil.copy(tiny_llama_dir / "config.json", tmp_path)
    torch.save({"model.norm.weight": torch.zeros(64), "args": Path("x")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: not a readable PyTorch file: UnpicklingError"):
        ids(tmp_path, pack_dir)
