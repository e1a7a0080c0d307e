"""Mixtral: Mistral whose MLPs are mixtures of experts.

Source: Jiang et al. 2024, https://arxiv.org/abs/2401.04088.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .blocks import Attention, Block, CausalLM, Sizes, pre_norm_lm
from .hf_config import Reader
from .moe import MoE, Routing
from .rope import Rope


def mixtral(raw: Mapping[str, Any]) -> CausalLM:
    """Build the model. Raises ValueError for what these equations do not cover."""
    read = Reader(raw, "mixtral")
    read.choice("hidden_act", ("silu",), "silu")
    c, routing = Sizes.from_hf(read), Routing(E=read.size("num_experts"), K=read.size("num_experts_per_tok"))
    window = read.size("sliding_window") if read.raw.get("sliding_window") is not None else 0
    blocks = [Block(c, Attention(c, window=window), MoE(c.D, c.I, routing)) for _ in range(c.num_layers)]
    return pre_norm_lm(c, blocks, [Rope.from_hf(read, c.E)] * c.num_layers)
