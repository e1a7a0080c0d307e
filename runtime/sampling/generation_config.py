"""The sampling options that a model's authors recommend, as vLLM's `generation_config` option uses them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seamwise.runtime.text.json_file import read_json

from .params import SamplingParams

# generation_config.json's names -> SamplingParams' names
_NAMES = {
    "repetition_penalty": "repetition_penalty", "temperature": "temperature", "top_k": "top_k", "top_p": "top_p",
    "min_p": "min_p", "max_new_tokens": "max_tokens",
}  # fmt: skip


def read_generation_config(source: str, model: Path) -> dict[str, Any]:
    """Return what a generation_config.json holds.

    source  "auto": the model's own, where it has one; "vllm": nothing; else a directory that must have one
    """
    if source == "vllm":
        return {}
    path = (model if source == "auto" else Path(source)) / "generation_config.json"
    if not path.is_file():
        if source == "auto":
            return {}
        raise ValueError(f'generation_config={source!r}: there is no {path}; wanted "auto", "vllm" or a directory')
    return read_json(path, dict)


def default_params(config: Mapping[str, Any]) -> SamplingParams:
    """Return the parameters of a request that brings none. Raises ValueError for a value that cannot be served."""
    found = {ours: config[theirs] for theirs, ours in _NAMES.items() if config.get(theirs) is not None}
    try:
        return SamplingParams(**found)
    except ValueError as error:
        raise ValueError(f'generation_config.json: {error}; pass generation_config="vllm" to leave it out') from error
