"""The model's own configuration, read from a Hugging Face directory without importing transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seamwise.model_defs import has_definition
from seamwise.model_defs.hf_config import OLDER_NAMES, Reader
from seamwise.model_defs.hf_defaults import completed
from seamwise.model_defs.rope import context_lengths
from seamwise.runtime.text.json_file import read_json
from seamwise.runtime.weights.checkpoint import holds_kv_scales
from seamwise.runtime.weights.file_formats import has_tensors
from seamwise.runtime.weights.gguf.config import find_gguf, read_gguf_config
from seamwise.runtime.weights.quantization_config import read_quantization
from seamwise.runtime.weights.tied import has_own_head

from .arguments import refuse_unknown
from .pooler import Pooler, read_pooler
from .text_part import text_part

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
_LENGTHS = ("max_seq_len", "seq_length", "max_target_positions")  # other names of the longest; without: vLLM's 2048
_ROPE = {"rope_parameters", "rope_scaling"}  # transformers 5's name and 4's
_MOST_PARAMETERS = 1 << 40  # no published model comes near


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What the runtime must know of a model; `raw` is config.json, completed, or what it would hold.

    num_kv_heads, head_dim  of the cached keys and values; with multi-head latent attention, of what latents expand to
    latent_dim  width of a token's latent and its rotary key, 0 without multi-head latent attention
    default_len, longest  tokens of the longest request: where nobody asks for another, and that may be asked for
    dtype    of the checkpoint, float32 where it does not say
    eos_ids  ids that end generation: generation_config.json's, else config.json's
    pooler   how it pools by its sentence-transformers files; has_head: whether its class predicts tokens
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    default_len: int
    longest: int
    latent_dim: int
    dtype: torch.dtype
    eos_ids: tuple[int, ...]
    raw: dict[str, Any]
    pooler: Pooler | None = None
    has_head: bool = True

    @classmethod
    def from_directory(cls, directory: Path, hf_overrides: Mapping[str, Any] | None = None) -> ModelConfig:
        """Read config.json and generation_config.json, or a GGUF file where there is no config.json.

        hf_overrides  values in place of config.json's (of a multimodal model, of its text's), by its keys
        Raises ValueError naming the file and the wrong value.
        """
        if not directory.exists():
            raise ValueError(f"model directory {directory} does not exist; wanted a Hugging Face model directory")
        path = directory / "config.json"
        if gguf := find_gguf(directory):
            path, raw = gguf, read_gguf_config(gguf)
        elif path.exists():
            raw = read_json(path, dict)
        else:
            raise ValueError(f"{directory}: has no config.json; wanted a Hugging Face model directory")
        recommended = directory / "generation_config.json"
        generation = read_json(recommended, dict) if recommended.exists() else {}
        names = raw.get("architectures")
        if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
            raise ValueError(
                f"{path}: architectures is {names!r}, wanted a list of one class name, like ['LlamaForCausalLM']"
            )
        raw = text_part(raw, str(path))
        _check_causal(raw, str(path))
        names = [decoder := _with_head(raw["architectures"][0])]
        has_head = raw["architectures"] == [decoder]
        complete = completed if has_definition(names[0]) else _completed_by_transformers
        raw = complete(names[0], raw)
        if hf_overrides:
            raw = complete(names[0], _overridden(raw, hf_overrides))
        if not gguf and raw.get("tie_word_embeddings") is not False and has_own_head(directory):
            raw["tie_word_embeddings"] = False  # the file counts
        if read_quantization(raw, str(path)) is not None and has_tensors(directory):
            raw["holds_kv_scales"] = holds_kv_scales(directory)
        read = Reader(raw, str(path))
        heads, hidden = read.size("num_attention_heads"), read.size("hidden_size")
        latent = raw.get("kv_lora_rank") is not None
        default_len, longest = context_lengths(raw)
        rotary = read.size("qk_rope_head_dim") if latent else 0
        config = cls(
            architecture=names[0],
            hidden_size=hidden,
            num_layers=read.size("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=heads if latent else read.size("num_key_value_heads", heads),
            head_dim=read.size("qk_nope_head_dim") + rotary if latent else read.size("head_dim", hidden // heads),
            vocab_size=read.size("vocab_size"),
            default_len=default_len,
            longest=longest,
            latent_dim=read.size("kv_lora_rank") + rotary if latent else 0,
            dtype=_DTYPES[read.choice("dtype", tuple(_DTYPES), "float32")],
            eos_ids=_token_ids("eos_token_id", generation, raw, directory),
            raw=raw,
            pooler=read_pooler(directory) if directory.is_dir() else None,
            has_head=has_head,
        )
        config._check(path)
        return config

    def _check(self, path: Path) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{path}: num_attention_heads={self.num_heads} is no multiple of"
                f" num_key_value_heads={self.num_kv_heads}"
            )
        if self.raw.get("head_dim") is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"{path}: hidden_size={self.hidden_size} is no multiple of num_attention_heads={self.num_heads}"
            )
        # A lower bound: embedding, the four projections of attention, and two matrices of the MLP.
        projections = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        width = self.raw.get("intermediate_size")
        mlp = 2 * self.hidden_size * width if isinstance(width, int) else 0
        parameters = self.vocab_size * self.hidden_size + self.num_layers * (projections + mlp)
        if parameters > _MOST_PARAMETERS:
            raise ValueError(
                f"{path}: describes a model of at least {parameters:.1e} parameters, wanted at most"
                f" {_MOST_PARAMETERS:.1e}; hidden_size={self.hidden_size}, intermediate_size={width},"
                f" num_hidden_layers={self.num_layers}, num_attention_heads={self.num_heads},"
                f" head_dim={self.head_dim}, vocab_size={self.vocab_size}"
            )


def _with_head(architecture: str) -> str:
    """Return the causal language model of a class without a head (Qwen3Model); any other class as it is."""
    if not architecture.endswith("Model") or architecture.endswith("LMHeadModel"):
        return architecture
    decoder = architecture.removesuffix("Model").removesuffix("Text") + "ForCausalLM"
    if has_definition(decoder):
        return decoder
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return decoder if decoder in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() else architecture


def _overridden(raw: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a completed configuration with other values. A RoPE, by one of its two names, replaces the one there is,
    whose base and share of columns stay where it names none."""
    if not isinstance(overrides, Mapping):
        raise ValueError(f"hf_overrides={overrides!r}: wanted keys of config.json with their values")
    if (fixed := {"architectures", "quantization_config"} & {*overrides}) or len(_ROPE & {*overrides}) > 1:
        what = " and ".join(sorted(fixed or _ROPE))
        raise ValueError(
            f"hf_overrides: {what}: " + ("is the checkpoint's" if fixed else "say the same; leave one out")
        )
    known = {*raw} | _ROPE
    if not has_definition(raw["architectures"][0]):
        from seamwise.model_defs.hf import class_and_config

        known |= {*class_and_config(raw["architectures"][0], raw)[1].to_dict()}
    refuse_unknown(overrides, known, {}, "key of config.json for hf_overrides:")
    if not (given := _ROPE & {*overrides}):
        return {**raw, **overrides}
    (name,) = given
    before, rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}, overrides[name]
    kept = {key: before[key] for key in ("rope_theta", "partial_rotary_factor") if key in before}
    rest = {key: value for key, value in {**raw, **overrides}.items() if key not in _ROPE}
    return {**rest, name: {**kept, **rope} if isinstance(rope, Mapping) else rope}


def _check_causal(raw: dict[str, Any], where: str) -> None:
    """Raise ValueError for a decoder whose tokens see those behind them, as some that pool were trained."""
    for name, wrong in (("is_causal", (False,)), ("use_bidirectional_attention", (True, "all"))):
        if raw.get(name) in wrong and raw.get(name) is not None:
            raise ValueError(f"{where}: {name} is {raw[name]!r}: attention to later tokens is not served")


def _completed_by_transformers(architecture: str, raw: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a class that is not defined here, with the sizes that it leaves out or names oddly.

    Imports transformers where one is missing only. What that does not know stays missing.
    """
    if all(any(raw.get(one) is not None for one in (name, *OLDER_NAMES.get(name, ()))) for name in _NEEDED):
        return raw
    from seamwise.model_defs.hf import class_and_config

    _, config = class_and_config(architecture, raw)
    sizes = {name: getattr(config, name, None) for name in _NEEDED}
    if sizes["max_position_embeddings"] is None:  # ALiBi has no table that ends
        sizes["max_position_embeddings"] = next((n for one in _LENGTHS if (n := getattr(config, one, None))), 2048)
    return {**raw, **{name: size for name, size in sizes.items() if size is not None and raw.get(name) is None}}


def _token_ids(name: str, generation: dict[str, Any], raw: dict[str, Any], directory: Path) -> tuple[int, ...]:
    file, values = ("generation_config.json", generation) if generation.get(name) is not None else ("config.json", raw)
    found = values.get(name)
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if any(type(i) is not int or i < 0 for i in ids):
        raise ValueError(f"{directory / file}: {name} is {found!r}, wanted a token id or a list of them")
    return tuple(ids)
