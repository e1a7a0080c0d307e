"""DeepSeek-V2, V3 and R1: multi-head latent attention, and experts of which some serve every token.

V2 chooses experts by softmax, within the groups that hold the best ones; V3 by sigmoid and a correction that balances
their load without a loss. Source: https://arxiv.org/abs/2405.04434 and https://arxiv.org/abs/2412.19437.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .blocks import MLP, Block, CausalLM, Sizes, pre_norm_lm
from .hf_config import Reader
from .mla import Latent, LatentAttention
from .moe import MoE, Routing
from .rope import Rope


def deepseek_v2(raw: Mapping[str, Any]) -> CausalLM:
    """Build the model. Raises ValueError for what is not covered."""
    read = Reader(raw, "deepseek_v2")
    method = read.choice("topk_method", ("greedy", "group_limited_greedy"), "greedy")
    read.choice("scoring_func", ("softmax",), "softmax")
    if read.flag("norm_topk_prob") or read.flag("mlp_bias"):
        raise ValueError("deepseek_v2: norm_topk_prob and mlp_bias must be false")
    return _lm(read, _routing(read, grouped=method != "greedy"))


def deepseek_v3(raw: Mapping[str, Any]) -> CausalLM:
    """Build the model. Raises ValueError for what is not covered."""
    read = Reader(raw, "deepseek_v3")
    return _lm(read, v3_routing(read))


def v3_routing(read: Reader) -> Routing:
    read.choice("topk_method", ("noaux_tc",), "noaux_tc")
    read.choice("scoring_func", ("sigmoid",), "sigmoid")
    normalize = read.flag("norm_topk_prob", True)
    return replace(_routing(read, grouped=True), score="sigmoid", normalize=normalize, corrected=True)


def latent_attention(read: Reader) -> LatentAttention:
    return LatentAttention(Latent.from_hf(read, interleaved=read.flag("rope_interleave", True)))


def mixture(read: Reader, c: Sizes, routing: Routing) -> MoE:
    """Return a layer's experts, with those that serve every token as one MLP."""
    width = read.size("moe_intermediate_size")
    return MoE(c.D, width, routing, MLP(replace(c, I=width * read.size("n_shared_experts"))))


def _routing(read: Reader, *, grouped: bool) -> Routing:
    return Routing(
        E=read.size("n_routed_experts"), K=read.size("num_experts_per_tok"), normalize=False, wide=True,
        scaling=read.positive("routed_scaling_factor", 1.0), num_groups=read.size("n_group") if grouped else 0,
        top_groups=read.size("topk_group") if grouped else 0,
    )  # fmt: skip


def _lm(read: Reader, routing: Routing) -> CausalLM:
    read.choice("hidden_act", ("silu",), "silu")
    if read.size("moe_layer_freq", 1) != 1:
        raise ValueError(f"{read.where}: moe_layer_freq is {read.raw['moe_layer_freq']}, wanted 1")
    c, rope = Sizes.from_hf(read), Rope.from_hf(read, read.size("qk_rope_head_dim"))
    dense = read.size("first_k_dense_replace") if read.raw.get("first_k_dense_replace") else 0
    blocks = [
        Block(c, latent_attention(read), MLP(c) if i < dense else mixture(read, c, routing))
        for i in range(c.num_layers)
    ]
    return pre_norm_lm(c, blocks, [rope] * c.num_layers)
