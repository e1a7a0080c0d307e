"""config.json is read, or refused by a message that names the file, the value and what was wanted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seamwise.model_defs.hf_config import Reader
from seamwise.model_defs.rope import Rope
from seamwise.runtime.build.model_config import ModelConfig
from seamwise.runtime.build.runner_config import RunnerConfig

PLAIN: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 512,
}  # fmt: skip


def read(directory: Path, changes: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    config = {k: v for k, v in (PLAIN | changes).items() if v is not ...}
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_directory(directory)


def test_reads_sizes_and_fills_what_older_files_leave_out(tmp_path: Path) -> None:
    config = read(tmp_path, {"dtype": "bfloat16", "head_dim": 32, "bos_token_id": 1})
    assert (config.architecture, config.hidden_size, config.num_layers) == ("LlamaForCausalLM", 64, 3)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 32)
    assert (config.vocab_size, config.longest, config.dtype) == (100, 512, torch.bfloat16)
    assert config.eos_ids == (2,)  # transformers' defaults for a Llama
    old = read(tmp_path, {"num_key_value_heads": ..., "torch_dtype": "float16"})
    assert (old.num_kv_heads, old.head_dim, old.dtype) == (4, 16, torch.float16)
    assert read(tmp_path, {}).dtype == torch.float32
    names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    oldest = read(tmp_path, {name: ... for name in names} | {names[name]: PLAIN[name] for name in names})
    assert (oldest.hidden_size, oldest.num_layers, oldest.num_heads) == (64, 3, 4)


@pytest.mark.parametrize(
    ("own", "generation", "eos_ids"),
    [(2, None, (2,)), ([2, 7], None, (2, 7)), (2, {}, (2,)), (2, {"eos_token_id": [5, 6]}, (5, 6)),
     (2, {"eos_token_id": 0}, (0,)), (2, {"eos_token_id": None}, (2,)), (None, {"eos_token_id": 4}, (4,))],
)  # fmt: skip
def test_eos_is_generation_configs_before_configs(
    own: Any, generation: dict[str, Any] | None, eos_ids: tuple[int, ...], tmp_path: Path
) -> None:
    assert read(tmp_path, {"eos_token_id": own}, generation).eos_ids == eos_ids


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ...}, "architectures is None, wanted a list of one class name"),
        ({"architectures": []}, r"architectures is \[\]"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 0}, "hidden_size is 0, wanted a whole number"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": 1 << 40}, "hidden_size is 1099511627776"),
        ({"hidden_size": 66}, "hidden_size=66 is no multiple of num_attention_heads=4"),
        ({"num_hidden_layers": 1 << 20}, "num_hidden_layers is 1048576, wanted a whole number from 1 to 4096"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is no multiple of num_key_value_heads=3"),
        ({"vocab_size": 1 << 24, "hidden_size": 1 << 20}, "describes a model of at least 2.7e[+]13 parameters"),
        ({"num_hidden_layers": 4096, "intermediate_size": 1 << 24}, "describes a model of at least 8.8e[+]12"),
        ({"max_position_embeddings": None}, "max_position_embeddings is missing"),
        ({"dtype": "float8"}, "dtype is 'float8', wanted 'float32' or 'bfloat16' or 'float16'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: quant_method is missing"),
        ({"quantization_config": 4}, "quantization_config is 4, wanted an object"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', wanted a token id or a list of them"),
        ({"eos_token_id": [2, -1]}, r"eos_token_id is \[2, -1\]"),
    ],
)
def test_wrong_values_are_named(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"config.json: {named}"):
        read(tmp_path, changes)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe{}", b"[" * 100_000, b'{"size": ' + b"9" * 5000])
def test_a_file_that_is_no_json_object_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json: (not valid JSON|holds list)"):
        ModelConfig.from_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PLAIN))
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"generation_config\.json: (not valid JSON|holds list)"):
        ModelConfig.from_directory(tmp_path)


TABLES = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("rope", "default", "longest"),
    [
        ({}, 512, 512),
        ({"rope_type": "linear", "factor": 4.0}, 512, 512),
        ({"rope_type": "longrope", "original_max_position_embeddings": 64, **TABLES}, 64, 512),
        ({"type": "su", "original_max_position_embeddings": 64, **TABLES}, 64, 512),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048, 2048),  # Qwen2.5's recipe
        ({"type": "yarn", "factor": 4.0}, 2048, 2048),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 512, 512),
        ({"type": "dynamic", "factor": 3.0}, 512, 1536),
    ],
)
def test_the_longest_request_follows_from_rope(
    rope: dict[str, Any], default: int, longest: int, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    config = read(tmp_path, {"rope_scaling": rope})
    assert (config.default_len, config.longest) == (default, longest)
    assert RunnerConfig.for_model(config).max_model_len == default
    said = [str(w.message) for w in recwarn if "trained at" in str(w.message)]
    assert len(said) == (default != longest) and all(f"up to {longest} may be asked for" in text for text in said)
    assert RunnerConfig.for_model(config, max_model_len=longest).max_model_len == longest
    with pytest.raises(ValueError, match=f"max_model_len={longest + 1}: wanted 1 to {longest}"):
        RunnerConfig.for_model(config, max_model_len=longest + 1)


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize("own", [{}, {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_theta": 5e5}])
@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_overrides_stand_in_the_place_of_what_the_file_says(own: dict[str, Any], name: str, tmp_path: Path) -> None:
    read(tmp_path, own)
    config = ModelConfig.from_directory(tmp_path, {name: YARN, "rms_norm_eps": 0.5})
    assert config.raw["rms_norm_eps"] == 0.5 and config.longest == 2048
    said = read(tmp_path, {key: v for key, v in own.items() if key != "rope_scaling"} | {"rope_scaling": YARN})
    assert Rope.from_hf(Reader(config.raw, ""), 16) == Rope.from_hf(Reader(said.raw, ""), 16)


def test_a_stretched_rope_keeps_its_base(tmp_path: Path) -> None:
    read(tmp_path, {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    kept = ModelConfig.from_directory(tmp_path, {"rope_parameters": YARN}).raw["rope_parameters"]
    assert kept == YARN | {"rope_theta": 5e5}
    other = ModelConfig.from_directory(tmp_path, {"rope_parameters": YARN | {"rope_theta": 7.0}}).raw
    assert other["rope_parameters"]["rope_theta"] == 7.0


@pytest.mark.parametrize(
    ("overrides", "wrong"),
    [
        (
            {"rope_paramaters": YARN},
            "no key of config.json for hf_overrides: 'rope_paramaters'; did you mean rope_para",
        ),
        ({"rope_scaling": YARN, "rope_parameters": YARN}, "rope_parameters and rope_scaling: say the same"),
        ({"architectures": ["X"]}, "hf_overrides: architectures: is the checkpoint's"),
        ([1], r"hf_overrides=\[1\]: wanted keys of config.json"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
    ],
)
def test_overrides_that_are_none_are_refused(overrides: Any, wrong: str, tmp_path: Path) -> None:
    read(tmp_path, {})
    with pytest.raises(ValueError, match=wrong):
        ModelConfig.from_directory(tmp_path, overrides)


def test_numbers_that_json_has_not_are_read_as_transformers_writes_them(tmp_path: Path) -> None:
    config = read(tmp_path, {"time_step_limit": [0.0, {"__float__": "Infinity"}]})
    assert config.raw["time_step_limit"] == [0.0, float("inf")]


def test_sizes_of_a_foreign_class_are_its_own_defaults(tmp_path: Path) -> None:
    raw: dict[str, Any] = {"architectures": ["OPTForCausalLM"], "model_type": "opt", "num_attention_heads": 16}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = ModelConfig.from_directory(tmp_path)
    assert (config.num_heads, config.hidden_size, config.num_layers, config.longest) == (
        16, 768, 12, 2048,
    )  # fmt: skip


def test_a_directory_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        ModelConfig.from_directory(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no config\.json; wanted a Hugging Face model directory"):
        ModelConfig.from_directory(tmp_path)


anything = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists)


@given(changes=st.dictionaries(st.sampled_from([*PLAIN, "head_dim", "dtype", "eos_token_id"]), anything))
def test_any_values_are_read_or_refused(changes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    try:
        config = read(tmp_path_factory.mktemp("model"), changes)
    except ValueError as error:
        assert "config.json: " in str(error)
    else:
        assert config.num_heads % config.num_kv_heads == 0


def test_reading_a_configuration_and_building_our_own_model_imports_no_transformers() -> None:
    code = f"""
import sys
from seamwise.model_defs import build_model
from seamwise.runtime.build.model_config import ModelConfig
build_model("LlamaForCausalLM", {PLAIN!r}, entry="own")
for name in ("transformers", "torch._dynamo", "torch._inductor"):
    assert name not in sys.modules, name
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
