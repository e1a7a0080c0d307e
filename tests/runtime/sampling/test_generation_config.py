"""What a model's authors recommend, where it comes from, and what stands in its way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from seamwise import SamplingParams
from seamwise.runtime.sampling.generation_config import default_params, read_generation_config


def write(directory: Path, **values: object) -> Path:
    (directory / "generation_config.json").write_text(json.dumps(values))
    return directory


def test_the_models_own_values_are_the_defaults(tmp_path: Path) -> None:
    write(tmp_path, temperature=0.6, top_k=20, top_p=0.95, max_new_tokens=7, repetition_penalty=1.1, do_sample=True)
    found = default_params(read_generation_config("auto", tmp_path))
    wanted = SamplingParams(temperature=0.6, top_k=20, top_p=0.95, max_tokens=7, repetition_penalty=1.1)
    assert found == wanted
    assert default_params(read_generation_config("vllm", tmp_path)) == SamplingParams()
    assert default_params(read_generation_config(str(tmp_path), tmp_path / "model")) == wanted


def test_a_model_without_one_has_the_librarys_defaults(tmp_path: Path) -> None:
    assert read_generation_config("auto", tmp_path) == {}
    with pytest.raises(ValueError, match='wanted "auto", "vllm" or a directory'):
        read_generation_config(str(tmp_path), tmp_path)


@pytest.mark.parametrize(("text", "words"), [("{", "not valid JSON"), ("[]", "holds list, wanted an object")])
def test_a_damaged_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_generation_config("auto", tmp_path)


def test_a_value_that_cannot_be_served_says_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'top_p: got 3, .*pass generation_config="vllm"'):
        default_params(read_generation_config("auto", write(tmp_path, top_p=3)))
