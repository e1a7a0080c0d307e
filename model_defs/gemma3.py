"""Gemma 3, text: Gemma 2 without caps, with norms on query and key heads; five layers with a sliding window to one
that sees everything, each kind with its own rotary position embedding.

Source: Gemma team 2025, https://arxiv.org/abs/2503.19786.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from .blocks import CausalLM
from .gemma2 import RMSNorm, gemma_lm, gemma_sizes
from .hf_config import Reader
from .rope import Rope


def gemma3(raw: Mapping[str, Any]) -> CausalLM:
    """Build the model. Raises ValueError for what these equations do not cover."""
    read = Reader(raw, "gemma3")
    c = gemma_sizes(read)
    if raw.get("attn_logit_softcapping") is not None:  # transformers reads it and does not use it
        raise ValueError(f"gemma3: attn_logit_softcapping is {raw['attn_logit_softcapping']!r}, wanted null")
    every = read.size("sliding_window_pattern", 6)
    windows = read.windows(c.num_layers, lambda i: (i + 1) % every != 0, 4096)
    near = read_rope(read, c.E, "sliding_attention", read.positive("rope_local_base_freq", 1e4), {})
    far = read_rope(read, c.E, "full_attention", read.positive("rope_theta", 1e6), read.part("rope_scaling"))
    ropes = [near if window else far for window in windows]
    return gemma_lm(read, c, windows, ropes, None, norm=partial(RMSNorm, eps=c.eps))


def read_rope(read: Reader, E: int, kind: str, theta: float, scaling: Mapping[str, Any]) -> Rope:
    """Return one kind of layers' rope: transformers 5 has rope_parameters[kind], transformers 4 theta and scaling."""
    found = {"rope_theta": theta, **scaling, **(read.part("rope_parameters").get(kind) or {})}
    return Rope.from_hf(Reader({**read.raw, "rope_scaling": None, "rope_parameters": found}, read.where), E)
