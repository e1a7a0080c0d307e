"""Adapters as PEFT saves them: adapter_config.json and adapter_model.safetensors, read whole or refused by name.

What a file asks for and is not served here would change what the model says, so it is an error that names it. An
adapter is known by the digest of its files' bytes: a name, or a path, can be given to other bytes.

Source: https://huggingface.co/docs/peft/main/en/developer_guides/checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_PREFIX = "base_model.model."
_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<role>[AB])\.weight")
_READ = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
# What says how an adapter was trained, or which layers it was asked for: which it has, its tensors say.
_OF_TRAINING = (
    "base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "inference_mode",
    "lora_dropout", "init_lora_weights", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "megatron_config", "megatron_core", "runtime_config",
    "qalora_group_size", "ensure_weight_tying",
)  # fmt: skip
_WHY = {  # keys that change what is computed, and why they are not served
    "use_dora": "DoRA divides by the norm of each changed row, which rows of other adapters do not share; merge it",
    "modules_to_save": "whole layers of an adapter's own would replace the model's for its rows alone; merge them",
    "lora_bias": "biases of lora_B are not added; train with lora_bias=False",
    "fan_in_fan_out": "layers whose weights lie transposed (Conv1D) are not served with adapters",
    "target_parameters": "parameters that are no linear layer's (stacked experts) are not changed by adapters here",
    "trainable_token_indices": "embeddings are the model's own for every row",
    "layer_replication": "layers that occur twice are another model",
    "alora_invocation_tokens": "an adapter is for a request's every token here",
    "use_qalora": "inputs that are pooled in groups are not served",
}
_INITIAL = ("pissa", "olora", "corda", "loftq", "lora_ga")  # change the model's weights, which the file does not hold


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """What one layer's output is changed by: scaling · B (A x), for A (R, K) and B (N, R)."""

    a_RK: Tensor
    b_NR: Tensor
    scaling: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter in memory: its layers by the paths of their modules.

    digest  sha256 of its files' bytes
    """

    digest: str
    layers: Mapping[str, LowRank]

    @property
    def rank(self) -> int:
        """The greatest rank of its layers."""
        return max(layer.a_RK.shape[0] for layer in self.layers.values())


def read_adapter(directory: Path) -> Adapter:
    """Read an adapter. Raises ValueError that lists all that is damaged, or is not served."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        written, stored = (directory / "adapter_config.json").read_bytes(), _tensor_bytes(directory)
        config, tensors = json.loads(written), load(stored)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"adapter {directory}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"adapter {directory}: adapter_config.json is no object")
    problems = _problems(config)
    layers = {} if problems else _layers(config, tensors, problems)
    if problems:
        raise ValueError(f"adapter {directory}: " + "; ".join(problems))
    digest = hashlib.sha256(len(written).to_bytes(8, "little") + written + stored).hexdigest()
    return Adapter(digest=digest, layers=layers)


def _tensor_bytes(directory: Path) -> bytes:
    path = directory / "adapter_model.safetensors"
    if not path.exists() and path.with_suffix(".bin").exists():
        raise ValueError("it has adapter_model.bin, which is code as much as data; save it as safetensors")
    return path.read_bytes()


def _problems(config: Mapping[str, Any]) -> list[str]:
    """Return what a configuration asks for that is not served."""
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')!r}, wanted 'LORA'")
    if (bias := config.get("bias", "none")) != "none":
        problems.append(f"bias={bias!r}: biases are the model's own for every row; train with bias='none'")
    for key in config.keys() - {*_READ, *_OF_TRAINING, "bias"}:
        if config[key]:
            why = _WHY.get(key, "it is not known here, and may change what is computed")
            problems.append(f"{key}={config[key]!r}: {why}")
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(_INITIAL):
        problems.append(f"init_lora_weights={initial!r} changes the model's weights; save it converted to plain LoRA")
    for key, kinds in (("r", int), ("lora_alpha", (int, float))):
        if isinstance(value := config.get(key), bool) or not isinstance(value, kinds) or value <= 0:
            problems.append(f"{key} is {value!r}, wanted a number above 0")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(isinstance(v, (int, float)) and v > 0 for v in pattern.values()):
            problems.append(f"{key} is {pattern!r}, wanted numbers above 0 by the names of layers")
    return sorted(problems)


def _layers(config: Mapping[str, Any], tensors: Mapping[str, Tensor], problems: list[str]) -> dict[str, LowRank]:
    """Return the layers that the tensors are of; what does not fit is added to the problems."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name.removeprefix(_PREFIX))
        if match is None:
            problems.append(f"{name}: {_why_no_layer(name)}")
        elif tensor.dim() != 2 or tensor.dtype not in _FLOATS:
            problems.append(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, wanted floats in two dimensions")
        else:
            found.setdefault(match["module"].removesuffix(".base_layer"), {})[match["role"]] = tensor
    layers = {}
    for module, pair in sorted(found.items()):
        if missing := {"A", "B"} - pair.keys():
            problems.append(f"{module} lacks its lora_{min(missing)}.weight")
            continue
        rank, scaling = _rank_and_scaling(config, module)
        (a_rank, _), (_, b_rank) = pair["A"].shape, pair["B"].shape
        if not a_rank == b_rank == rank:
            problems.append(
                f"{module} has ranks {a_rank} (lora_A) and {b_rank} (lora_B), its configuration says {rank}"
            )
            continue
        layers[module] = LowRank(a_RK=pair["A"], b_NR=pair["B"], scaling=scaling)
    if not tensors:
        problems.append("it has no tensors")
    return layers


def _why_no_layer(name: str) -> str:
    if "lora_embedding" in name:
        return "embeddings are the model's own for every row; train without them in target_modules"
    if "lora_magnitude_vector" in name:
        return _WHY["use_dora"]
    return "is no lora_A.weight or lora_B.weight of a layer, and nothing else of an adapter is served"


def _rank_and_scaling(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Return a layer's rank, and what its update is multiplied by: alpha / r, or alpha / √r with rslora."""

    def of(pattern: str, default: Any) -> Any:
        patterns = config.get(pattern) or {}
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)

    rank, alpha = of("rank_pattern", config["r"]), of("alpha_pattern", config["lora_alpha"])
    return rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)
