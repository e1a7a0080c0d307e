"""Qwen 3, mixture of experts: Qwen 3 whose MLPs, or some of them, are mixtures of experts.

Source: Yang et al. 2025, https://arxiv.org/abs/2505.09388.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from .blocks import MLP, Attention, Block, CausalLM, RMSNorm, Sizes, pre_norm_lm
from .hf_config import Reader
from .moe import MoE, Routing
from .rope import Rope


def qwen3_moe(raw: Mapping[str, Any]) -> CausalLM:
    """Build the model. Raises ValueError for what these equations do not cover."""
    read = Reader(raw, "qwen3_moe")
    read.choice("hidden_act", ("silu",), "silu")
    c, bias = Sizes.from_hf(read), read.flag("attention_bias")
    window = read.size("sliding_window", 4096) if read.flag("use_sliding_window") else 0
    routing = Routing(
        E=read.size("num_experts"), K=read.size("num_experts_per_tok"), normalize=read.flag("norm_topk_prob")
    )
    width, every, dense = read.size("moe_intermediate_size"), read.size("decoder_sparse_step", 1), dense_layers(read)

    def mlp(i: int) -> nn.Module:
        return MLP(c) if i in dense or (i + 1) % every else MoE(c.D, width, routing)

    attend = partial(Attention, c, bias=bias, out_bias=bias, norm=partial(RMSNorm, eps=c.eps), window=window)
    blocks = [Block(c, attend(), mlp(i)) for i in range(c.num_layers)]
    return pre_norm_lm(c, blocks, [Rope.from_hf(read, c.E)] * c.num_layers)


def dense_layers(read: Reader) -> list[int]:
    """Return the layers that keep a plain MLP whatever the others do."""
    got = read.raw.get("mlp_only_layers") or []
    if not isinstance(got, list) or not all(type(i) is int for i in got):
        raise ValueError(f"{read.where}: mlp_only_layers is {got!r}, wanted a list of layers")
    return got
