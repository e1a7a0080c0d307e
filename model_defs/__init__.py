"""Models as plain PyTorch equations, and any transformers decoder through its own class.

To add a model: one file with its module, one line in DEFINITIONS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .llama import Llama

DEFINITIONS: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "LlamaForCausalLM": Llama,
}


def has_definition(architecture: str) -> bool:
    """Return whether Seamwise defines this architecture (a class name of config.json's `architectures`)."""
    return architecture in DEFINITIONS


def build_model(architecture: str, raw: Mapping[str, Any], *, entry: str) -> nn.Module:
    """Build a model without weights: parameters on the meta device, computed buffers real.

    entry  "own": the definition here; "transformers": the checkpoint's own class. Raises ValueError for a
    configuration that cannot be served.
    """
    if entry == "transformers":
        from .hf import HuggingFaceDecoder

        return HuggingFaceDecoder(architecture, raw)
    with torch.device("meta"):
        return DEFINITIONS[architecture](raw).eval()
