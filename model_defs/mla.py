"""Multi-head latent attention: keys and values of all heads come from one latent a token, and only that is cached.

T tokens, D model width, H heads, N columns of a head without position and R with it, V of its value, C latent, Q query
latent. A row [latent, rotary key] a token is cached, C + R wide, and `mla_prefill` multiplies queries into the latent
space (the absorbed form) where that is less work than expanding the latents. transformers' own class expands always.
Source: DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seamwise.kernels import mla_append, mla_prefill, rope

from .blocks import Cache, RMSNorm, Table, Where
from .hf_config import Reader
from .rope import softmax_scale

_EPS = 1e-6  # of the latents' norms, whatever rms_norm_eps says


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Sizes by the letters above; Q is 0 where queries have no latent."""

    D: int
    H: int
    N: int
    R: int
    V: int
    C: int
    Q: int
    scale: float
    bias: bool
    interleaved: bool

    @classmethod
    def from_hf(cls, read: Reader, *, interleaved: bool) -> Latent:
        """Read a config.json; `interleaved`: rotated columns are neighbours."""
        N, R = read.size("qk_nope_head_dim"), read.size("qk_rope_head_dim")
        return cls(
            D=read.size("hidden_size"), H=read.size("num_attention_heads"), N=N, R=R, V=read.size("v_head_dim"),
            C=read.size("kv_lora_rank"), Q=0 if read.raw.get("q_lora_rank") is None else read.size("q_lora_rank"),
            scale=(N + R) ** -0.5 * softmax_scale(read), bias=read.flag("attention_bias"), interleaved=interleaved,
        )  # fmt: skip


class Expansion(nn.Module):
    """W_UK and W_UV, one below the other for each head: from a latent to the head's key and value."""

    published_class = "Linear"  # by which a quantization_config names it

    def __init__(self, c: Latent) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c.H * (c.N + c.V), c.C))


class LatentAttention(nn.Module):
    def __init__(self, c: Latent) -> None:
        super().__init__()
        self.c = c
        if c.Q:
            self.q_a_proj = nn.Linear(c.D, c.Q, bias=c.bias)
            self.q_a_layernorm = RMSNorm(c.Q, _EPS)
            self.q_b_proj = nn.Linear(c.Q, c.H * (c.N + c.R), bias=False)
        else:
            self.q_proj = nn.Linear(c.D, c.H * (c.N + c.R), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(c.D, c.C + c.R, bias=c.bias)
        self.kv_a_layernorm = RMSNorm(c.C, _EPS)
        self.kv_b_proj = Expansion(c)
        self.o_proj = nn.Linear(c.H * c.V, c.D, bias=c.bias)

    def forward(self, x_TD: Tensor, table: Table, cache: Cache, where: Where) -> Tensor:
        c = self.c
        q_TX = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_TD))) if c.Q else self.q_proj(x_TD)
        q_nope_THN, q_rope_THR = q_TX.view(-1, c.H, c.N + c.R).split((c.N, c.R), -1)
        latent_TC, k_rope_TR = self.kv_a_proj_with_mqa(x_TD).split((c.C, c.R), -1)
        latent_TC = self.kv_a_layernorm(latent_TC)
        q_rope_THR = rope(q_rope_THR, *table, c.interleaved)
        k_rope_T1R = rope(k_rope_TR.unsqueeze(1), *table, c.interleaved)
        slot_mapping_T, *spans = where
        mla_append(latent_TC, k_rope_T1R.squeeze(1), *cache, slot_mapping_T)
        kv_b_HXC = self.kv_b_proj.weight.view(c.H, c.N + c.V, c.C)
        return self.o_proj(mla_prefill(q_nope_THN, q_rope_THR, *cache, kv_b_HXC, *spans, c.scale).flatten(1))
