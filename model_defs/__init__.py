"""Models as plain PyTorch equations, and any transformers decoder through its own class.

To add a model: one file with its module (a function in llama.py where only a line differs), one line in DEFINITIONS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .deepseek import deepseek_v2, deepseek_v3
from .deepseek_mtp import ARCHITECTURE, deepseek_mtp
from .gemma2 import gemma2
from .gemma3 import gemma3
from .gpt_oss import gpt_oss
from .hf_defaults import completed
from .llama import llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from .phi3 import phi3

DEFINITIONS: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "DeepseekV2ForCausalLM": deepseek_v2,
    "DeepseekV3ForCausalLM": deepseek_v3,
    "Gemma2ForCausalLM": gemma2,
    "Gemma3ForCausalLM": gemma3,
    "GptOssForCausalLM": gpt_oss,
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "MixtralForCausalLM": mixtral,
    "Phi3ForCausalLM": phi3,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "Qwen3MoeForCausalLM": qwen3_moe,
}
PARTS: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    ARCHITECTURE: deepseek_mtp
}  # which no checkpoint is alone


def has_definition(architecture: str) -> bool:
    """Return whether Seamwise defines this architecture (a class name of config.json's `architectures`)."""
    return architecture in DEFINITIONS


def build_model(
    architecture: str, raw: Mapping[str, Any], *, entry: str = "auto", max_model_len: int | None = None
) -> nn.Module:
    """Build a model without weights: parameters on the meta device, computed buffers real.

    raw    config.json as read; what it leaves out is transformers' default
    entry  "own": the definition here; "transformers": the checkpoint's own class; "auto": the first there is
    max_model_len  longest request in tokens, by which the tables of LongRoPE and "dynamic" RoPE are chosen; default:
                   as trained, the shorter

    Raises ValueError for an architecture or a configuration that cannot be served.
    """
    if entry not in ("own", "transformers", "auto"):
        raise ValueError(f"entry={entry!r}: wanted 'own', 'transformers' or 'auto'")
    definitions = DEFINITIONS | PARTS
    if entry == "own" and architecture not in definitions:
        known = ", ".join(DEFINITIONS)
        raise ValueError(
            f"architecture {architecture!r}: Seamwise defines {known}; use entry='transformers' for any other"
        )
    if max_model_len is not None:
        raw = {**raw, "max_model_len": max_model_len}
    if entry == "transformers" or architecture not in definitions:
        from .hf import HuggingFaceDecoder

        return HuggingFaceDecoder(architecture, raw)
    with torch.device("meta"), _SkipInit():
        return definitions[architecture](completed(architecture, raw)).eval()


class _SkipInit(TorchFunctionMode):
    """Leaves parameters as they are: drawing random numbers on meta would import the compiler, which takes a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
