"""The model's own configuration, read from a Hugging Face directory without importing transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LARGEST = 1 << 24  # no real hidden size, vocabulary or depth comes near; a corrupt file easily does


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What the runtime must know of a model; `raw` is config.json as read.

    dtype    of the checkpoint, float32 where it does not say
    eos_ids  ids that end generation: generation_config.json's, else config.json's
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    dtype: torch.dtype
    eos_ids: tuple[int, ...]
    raw: dict[str, Any]

    @classmethod
    def from_directory(cls, directory: Path) -> ModelConfig:
        """Read config.json and generation_config.json. Raises ValueError naming file and value."""
        if not directory.is_dir():
            raise ValueError(f"model directory {directory} does not exist")
        raw = _read_json(directory / "config.json", required=True)
        generation = _read_json(directory / "generation_config.json", required=False)
        names = raw.get("architectures")
        if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
            raise ValueError(f"{directory}/config.json: architectures is {names!r}, wanted a list with one class name")
        read = _Sizes(raw, directory / "config.json")
        heads = read("num_attention_heads")
        hidden = read("hidden_size")
        kv_heads = read("num_key_value_heads", heads)
        if heads % kv_heads:
            raise ValueError(
                f"{read.path}: num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}"
            )
        if "head_dim" not in raw and hidden % heads:
            raise ValueError(f"{read.path}: hidden_size={hidden} is no multiple of num_attention_heads={heads}")
        dtype = raw.get("dtype", raw.get("torch_dtype")) or "float32"
        if dtype not in _DTYPES:
            raise ValueError(f"{read.path}: dtype is {dtype!r}, wanted one of {', '.join(_DTYPES)}")
        eos = generation.get("eos_token_id", raw.get("eos_token_id"))
        return cls(
            architecture=names[0],
            hidden_size=hidden,
            num_layers=read("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=read("head_dim", hidden // heads),
            vocab_size=read("vocab_size"),
            max_position_embeddings=read("max_position_embeddings"),
            dtype=_DTYPES[dtype],
            eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            raw=raw,
        )


class _Sizes:
    """Reads positive integers of a sane size out of a configuration."""

    def __init__(self, raw: dict[str, Any], path: Path) -> None:
        self.raw, self.path = raw, path

    def __call__(self, name: str, default: int | None = None) -> int:
        got = self.raw.get(name)
        if got is None:
            got = default
        if not isinstance(got, int) or isinstance(got, bool) or not 1 <= got <= _LARGEST:
            raise ValueError(f"{self.path}: {name} is {got!r}, wanted a whole number from 1 to {_LARGEST}")
        return got


def _read_json(path: Path, *, required: bool) -> dict[str, Any]:
    if not path.exists():
        if required:
            raise ValueError(f"{path.parent}: has no {path.name}; wanted a Hugging Face model directory")
        return {}
    try:
        read = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{path}: holds {type(read).__name__}, wanted an object")
    return read
