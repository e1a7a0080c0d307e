"""Llama 2 and 3: the shared equations as they are, with biases where the configuration has them.

Source: Touvron et al. 2023, https://arxiv.org/abs/2307.09288; Llama 3: https://arxiv.org/abs/2407.21783.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .blocks import MLP, Attention, Block, CausalLM, Sizes, pre_norm_lm
from .hf_config import Reader
from .rope import Rope


def llama(raw: Mapping[str, Any]) -> CausalLM:
    """Build the model. Raises ValueError for what these equations do not cover."""
    read = Reader(raw, "llama")
    read.choice("hidden_act", ("silu",), "silu")
    c, bias, mlp_bias = Sizes.from_hf(read), read.flag("attention_bias"), read.flag("mlp_bias")
    blocks = [Block(c, Attention(c, bias=bias, out_bias=bias), MLP(c, bias=mlp_bias)) for _ in range(c.num_layers)]
    return pre_norm_lm(c, blocks, [Rope.from_hf(read, c.E)] * c.num_layers)
