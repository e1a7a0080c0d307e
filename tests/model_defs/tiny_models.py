"""Tiny random checkpoints made with transformers' own classes, which are the reference of every model test."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from plain_modules import load_weights
from torch import Tensor, nn

from seamwise.compile.parameter import parameters_in
from seamwise.model_defs import build_model
from seamwise.runtime.build.model_config import ModelConfig
from seamwise.runtime.weights.foreign import as_transformers_reads

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


def save_tiny(
    directory: Path, architecture: str, *, seed: int = 0, only: dict[str, Any] | None = None, **changes: Any
) -> Any:
    """Save a tiny random model of transformers' class and return it; no weight is at its neutral value.

    only  what is not the class's default, in place of SIZES and changes
    """
    import transformers

    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**(SIZES | changes if only is None else only))
    config._attn_implementation = config._experts_implementation = "eager"  # which run in float64 too
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else parameter + 0.2 * noise)
        for name, buffer in model.named_buffers():
            if name in model.state_dict():  # what corrects routers' scores
                buffer.add_(0.2 * torch.randn(buffer.shape, generator=generator))
    model.save_pretrained(directory)
    return model


def load_tiny(
    directory: Path, entry: str, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, ModelConfig]:
    """Load a directory as the eager module of one entry."""
    config = ModelConfig.from_directory(directory)
    model = build_model(config.architecture, config.raw, entry=entry, **options)
    read = None
    if entry == "transformers":
        read = partial(
            as_transformers_reads, parameters=parameters_in(model), architecture=config.architecture, raw=config.raw
        )
    load_weights(model, directory, dtype=dtype, device="cpu", convert=read)
    return model, config


def reference(model: Any, requests: list[list[int]]) -> list[Tensor]:
    """Return transformers' own logits of each request alone."""
    with torch.no_grad():
        return [model(torch.tensor([tokens]), use_cache=False).logits[0] for tokens in requests]


def assert_within_budget(got: list[Tensor], model: Any, requests: list[list[int]]) -> None:
    """Hold |got - f64| <= 2 (|reference - f64| + eps max|f64|), reference in got's dtype; leaves model in float64."""
    same = torch.cat(reference(model.to(got[0].dtype), requests))
    exact = torch.cat(reference(model.double(), requests))
    ours = torch.cat(got)
    budget = 2 * ((same - exact).abs().max() + torch.finfo(ours.dtype).eps * exact.abs().max()).item()
    error = (ours - exact).abs().max().item()
    assert error <= budget, f"requests of {[len(r) for r in requests]} tokens: error {error:.2e}, budget {budget:.2e}"
