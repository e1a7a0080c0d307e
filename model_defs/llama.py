"""Llama 2 and 3, and the families that differ from it in a line: Mistral, Mixtral, Qwen 2 and 3.

Sources: Llama 2, https://arxiv.org/abs/2307.09288; Llama 3, https://arxiv.org/abs/2407.21783; Mistral,
https://arxiv.org/abs/2310.06825; Mixtral, https://arxiv.org/abs/2401.04088; Qwen 2, https://arxiv.org/abs/2407.10671;
Qwen 3, https://arxiv.org/abs/2505.09388.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from .blocks import MLP, Attention, Block, CausalLM, RMSNorm, Sizes, activation, pre_norm_lm
from .hf_config import Reader
from .moe import MoE, Routing
from .rope import Rope


def llama(raw: Mapping[str, Any]) -> CausalLM:
    """The shared equations as they are, with biases where the configuration has them."""
    read = Reader(raw, "llama")
    c, bias, mlp_bias = Sizes.from_hf(read), read.flag("attention_bias"), read.flag("mlp_bias")
    act = activation(read)
    return _lm(read, c, [0] * c.num_layers, lambda i: MLP(c, bias=mlp_bias, act=act), bias=bias, out_bias=bias)


def mistral(raw: Mapping[str, Any]) -> CausalLM:
    """Attention may see the last `sliding_window` tokens only."""
    read = Reader(raw, "mistral")
    c, window = Sizes.from_hf(read), 0 if read.is_null("sliding_window") else read.size("sliding_window", 4096)
    return _lm(read, c, [window] * c.num_layers, lambda i: MLP(c, act=activation(read)))


def mixtral(raw: Mapping[str, Any]) -> CausalLM:
    """Mistral whose MLPs are mixtures of experts."""
    read = Reader(raw, "mixtral")
    read.choice("hidden_act", ("silu",), "silu")
    c, routing = Sizes.from_hf(read), Routing(E=read.size("num_experts"), K=read.size("num_experts_per_tok"))
    window = read.size("sliding_window") if read.raw.get("sliding_window") is not None else 0
    return _lm(read, c, [window] * c.num_layers, lambda i: MoE(c.D, c.I, routing))


def qwen2(raw: Mapping[str, Any]) -> CausalLM:
    """Biases on queries, keys and values; the upper layers may have a sliding window."""
    read = Reader(raw, "qwen2")
    c = Sizes.from_hf(read)
    return _lm(read, c, _upper_windows(read, c.num_layers), lambda i: MLP(c, act=activation(read)), bias=True)


def qwen3(raw: Mapping[str, Any]) -> CausalLM:
    """An RMSNorm on each query and key head before it is rotated."""
    read = Reader(raw, "qwen3")
    c = Sizes.from_hf(read)
    return _lm(
        read, c, _upper_windows(read, c.num_layers), lambda i: MLP(c, act=activation(read)), **_qwen3_attention(read, c)
    )


def qwen3_moe(raw: Mapping[str, Any]) -> CausalLM:
    """Qwen 3 whose MLPs, or some of them, are mixtures of experts."""
    read = Reader(raw, "qwen3_moe")
    read.choice("hidden_act", ("silu",), "silu")
    c, window = Sizes.from_hf(read), read.size("sliding_window", 4096) if read.flag("use_sliding_window") else 0
    routing = Routing(
        E=read.size("num_experts"), K=read.size("num_experts_per_tok"), normalize=read.flag("norm_topk_prob")
    )
    width, every, dense = read.size("moe_intermediate_size"), read.size("decoder_sparse_step", 1), _dense_layers(read)

    def mlp(i: int) -> nn.Module:
        return MLP(c) if i in dense or (i + 1) % every else MoE(c.D, width, routing)

    return _lm(read, c, [window] * c.num_layers, mlp, **_qwen3_attention(read, c))


def _lm(
    read: Reader, c: Sizes, windows: Sequence[int], mlp: Callable[[int], nn.Module], **attention: Any
) -> CausalLM:  # fmt: skip
    """Put a model together of each layer's window and MLP."""
    blocks = [Block(c, Attention(c, window=window, **attention), mlp(i)) for i, window in enumerate(windows)]
    return pre_norm_lm(c, blocks, [Rope.from_hf(read, c.E)] * c.num_layers)


def _qwen3_attention(read: Reader, c: Sizes) -> dict[str, Any]:
    bias = read.flag("attention_bias")
    return {"bias": bias, "out_bias": bias, "norm": partial(RMSNorm, eps=c.eps)}


def _upper_windows(read: Reader, num_layers: int) -> list[int]:
    """Return each layer's window: from layer max_window_layers on where use_sliding_window says so, else none."""
    first = read.count("max_window_layers", 28) if read.flag("use_sliding_window") else num_layers
    return read.windows(num_layers, lambda i: i >= first, 4096)


def _dense_layers(read: Reader) -> list[int]:
    """Return the layers that keep a plain MLP whatever the others do."""
    got = read.raw.get("mlp_only_layers") or []
    if not isinstance(got, list) or not all(type(i) is int for i in got):
        raise ValueError(f"{read.where}: mlp_only_layers is {got!r}, wanted a list of layers")
    return got
