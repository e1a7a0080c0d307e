"""Random adapters of tiny models, made and saved by PEFT itself, whose logits are the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save_adapter(directory: Path, model: Path, *, seed: int = 0, **config: Any) -> Any:
    """Save an adapter whose matrices are all random, and return PEFT's model with it, in float32."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    wanted = {"r": 4, "lora_alpha": 8, "target_modules": list(ALL), "task_type": "CAUSAL_LM", **config}
    made = get_peft_model(base, LoraConfig(**wanted)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    made.save_pretrained(directory)
    return made


def logits_of(model: Any, requests: list[list[int]]) -> list[torch.Tensor]:
    """Return PEFT's, or transformers', own logits of each request alone."""
    with torch.no_grad():
        return [model(torch.tensor([tokens]), use_cache=False).logits[0] for tokens in requests]
