"""Gemma 2: norms that multiply by 1 + w, before and after attention and MLP; capped scores and logits; every other
layer has a sliding window; the embedding is scaled.

Source: Gemma team 2024, https://arxiv.org/abs/2408.00118.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import blocks
from .blocks import MLP, Attention, CausalLM, Decoder, Sizes
from .hf_config import Reader
from .rope import Rope


class RMSNorm(blocks.RMSNorm):
    def forward(self, x_TD: Tensor) -> Tensor:
        wide_TD = x_TD.float()
        normed_TD = wide_TD * torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + self.eps)
        return (normed_TD * (1.0 + self.weight.float())).to(x_TD.dtype)


class Embedding(nn.Embedding):
    scale: Tensor

    def __init__(self, V: int, D: int) -> None:
        super().__init__(V, D)
        self.register_buffer("scale", torch.tensor(D**0.5, device="cpu"), persistent=False)

    def forward(self, token_ids_T: Tensor) -> Tensor:
        return super().forward(token_ids_T) * self.scale.to(self.weight.dtype)  # rounded as Gemma was trained


class Block(nn.Module):
    def __init__(self, c: Sizes, attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.D, c.eps)
        self.self_attn = attn
        self.post_attention_layernorm = RMSNorm(c.D, c.eps)
        self.pre_feedforward_layernorm = RMSNorm(c.D, c.eps)
        self.mlp = mlp
        self.post_feedforward_layernorm = RMSNorm(c.D, c.eps)

    def forward(self, x_TD: Tensor, *step: Any) -> Tensor:
        x_TD = x_TD + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x_TD), *step))
        return x_TD + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x_TD)))


def gemma2(raw: Mapping[str, Any]) -> CausalLM:
    """Build the model. Raises ValueError for what these equations do not cover."""
    read = Reader(raw, "gemma2")
    c = gemma_sizes(read)
    windows = read.windows(c.num_layers, lambda i: i % 2 == 0, 4096)
    softcap = read_cap(read, "attn_logit_softcapping", 50.0)
    return gemma_lm(read, c, windows, [Rope.from_hf(read, c.E)] * c.num_layers, 30.0, softcap=softcap)


def gemma_lm(
    read: Reader, c: Sizes, windows: Sequence[int], ropes: Sequence[Rope], logit_cap: float | None, **attention: Any
) -> CausalLM:
    """Put a Gemma together; `logit_cap` is what final_logit_softcapping means where it is not there."""
    bias, scale = read.flag("attention_bias"), read.positive("query_pre_attn_scalar", 256.0) ** -0.5
    attend = partial(Attention, c, bias=bias, out_bias=bias, scale=scale, **attention)
    act = partial(F.gelu, approximate="tanh")
    layers = [Block(c, attend(window=window), MLP(c, act=act)) for window in windows]
    decoder = Decoder(Embedding(c.V, c.D), layers, RMSNorm(c.D, c.eps), ropes)
    return CausalLM(c, decoder, softcap=read_cap(read, "final_logit_softcapping", logit_cap))


def gemma_sizes(read: Reader) -> Sizes:
    """Read what Gemmas have in common, and refuse what these equations do not cover."""
    read.choice("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    if read.flag("use_bidirectional_attention"):
        raise ValueError(f"{read.where}: use_bidirectional_attention is true, wanted causal attention")
    return Sizes.from_hf(read, tied=True)


def read_cap(read: Reader, name: str, default: float | None) -> float:
    """Return a soft cap, 0 for none."""
    off = read.is_null(name) or (default is None and name not in read.raw)
    return 0.0 if off else read.positive(name, default)
