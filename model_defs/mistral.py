"""Mistral: Llama whose attention may see the last `sliding_window` tokens only.

Source: Jiang et al. 2023, https://arxiv.org/abs/2310.06825.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .blocks import MLP, Attention, Block, CausalLM, Sizes, pre_norm_lm
from .hf_config import Reader
from .rope import Rope


def mistral(raw: Mapping[str, Any]) -> CausalLM:
    """Build the model. Raises ValueError for what these equations do not cover."""
    read = Reader(raw, "mistral")
    read.choice("hidden_act", ("silu",), "silu")
    c = Sizes.from_hf(read)
    window = 0 if read.is_null("sliding_window") else read.size("sliding_window", 4096)
    blocks = [Block(c, Attention(c, window=window), MLP(c)) for _ in range(c.num_layers)]
    return pre_norm_lm(c, blocks, [Rope.from_hf(read, c.E)] * c.num_layers)
