"""Qwen 2 and 2.5: Llama with biases on queries, keys and values; the upper layers may have a sliding window.

Source: Yang et al. 2024, https://arxiv.org/abs/2407.10671.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .blocks import MLP, Attention, Block, CausalLM, Sizes, pre_norm_lm
from .hf_config import Reader
from .rope import Rope


def qwen2(raw: Mapping[str, Any]) -> CausalLM:
    """Build the model. Raises ValueError for what these equations do not cover."""
    read = Reader(raw, "qwen2")
    read.choice("hidden_act", ("silu",), "silu")
    c = Sizes.from_hf(read)
    blocks = [Block(c, Attention(c, bias=True, window=w), MLP(c)) for w in upper_windows(read, c.num_layers)]
    return pre_norm_lm(c, blocks, [Rope.from_hf(read, c.E)] * c.num_layers)


def upper_windows(read: Reader, num_layers: int) -> list[int]:
    """Return each layer's window: from layer max_window_layers on where use_sliding_window says so, else none."""
    first = read.size("max_window_layers", 28) if read.flag("use_sliding_window") else num_layers
    return read.windows(num_layers, lambda i: i >= first, 4096)
