"""Qwen 3, dense: Llama with an RMSNorm on each query and key head before it is rotated.

Source: Yang et al. 2025, https://arxiv.org/abs/2505.09388.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from .blocks import MLP, Attention, Block, CausalLM, RMSNorm, Sizes, pre_norm_lm
from .hf_config import Reader
from .qwen2 import upper_windows
from .rope import Rope


def qwen3(raw: Mapping[str, Any]) -> CausalLM:
    """Build the model. Raises ValueError for what these equations do not cover."""
    read = Reader(raw, "qwen3")
    read.choice("hidden_act", ("silu",), "silu")
    read.size("head_dim")  # transformers' default is no quotient of sizes, so it must be there
    c, bias = Sizes.from_hf(read), read.flag("attention_bias")
    norm = partial(RMSNorm, eps=c.eps)
    blocks = [
        Block(c, Attention(c, bias=bias, out_bias=bias, norm=norm, window=w), MLP(c))
        for w in upper_windows(read, c.num_layers)
    ]
    return pre_norm_lm(c, blocks, [Rope.from_hf(read, c.E)] * c.num_layers)
