"""Llama 2 and 3, as equations.

T tokens of all requests, D model width, H query heads, K key/value heads, E head width, F = E/2 rotation speeds,
I MLP width, V vocabulary. Parameter names are those of Hugging Face checkpoints.
Source: Touvron et al. 2023, https://arxiv.org/abs/2307.09288; Llama 3: https://arxiv.org/abs/2407.21783.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seamwise.kernels import attention, kv_append

from .hf_config import Reader
from .rope import Rope


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """Sizes by the letters above."""

    D: int
    H: int
    K: int
    E: int
    I: int
    V: int
    num_layers: int
    eps: float
    rope: Rope
    attention_bias: bool
    mlp_bias: bool
    tied: bool

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> LlamaConfig:
        """Read a config.json. Raises ValueError for what these equations do not cover."""
        read = Reader(raw, "llama")
        read.choice("hidden_act", ("silu",), "silu")
        D, H = read.size("hidden_size"), read.size("num_attention_heads")
        return cls(
            D=D, H=H, K=read.size("num_key_value_heads", H), E=read.size("head_dim", D // H),
            I=read.size("intermediate_size"), V=read.size("vocab_size"), num_layers=read.size("num_hidden_layers"),
            eps=read.positive("rms_norm_eps", 1e-6), rope=Rope.from_hf(read),
            attention_bias=read.flag("attention_bias"), mlp_bias=read.flag("mlp_bias"),
            tied=read.flag("tie_word_embeddings"),
        )  # fmt: skip


class RMSNorm(nn.Module):
    def __init__(self, D: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(D))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return F.rms_norm(x_TD, self.weight.shape, self.weight, self.eps)


def rotate(x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    low, high = x_THE.chunk(2, -1)
    return x_THE * cos_TE.unsqueeze(-2) + torch.cat((-high, low), -1) * sin_TE.unsqueeze(-2)


class Attention(nn.Module):
    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.D, c.H * c.E, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.D, c.K * c.E, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.D, c.K * c.E, bias=c.attention_bias)
        self.o_proj = nn.Linear(c.H * c.E, c.D, bias=c.attention_bias)

    def forward(
        self, x_TD: Tensor, cos_TE: Tensor, sin_TE: Tensor, cache: Sequence[Tensor], where: Sequence[Tensor]
    ) -> Tensor:
        slot_mapping_T, *spans = where
        q_THE = rotate(self.q_proj(x_TD).view(-1, self.c.H, self.c.E), cos_TE, sin_TE)
        k_TKE = rotate(self.k_proj(x_TD).view(-1, self.c.K, self.c.E), cos_TE, sin_TE)
        v_TKE = self.v_proj(x_TD).view(-1, self.c.K, self.c.E)
        kv_append(k_TKE, v_TKE, *cache, slot_mapping_T)
        return self.o_proj(attention(q_THE, *cache, *spans, self.c.E**-0.5).flatten(1))


class MLP(nn.Module):
    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.D, c.I, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.D, c.I, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.I, c.D, bias=c.mlp_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Block(nn.Module):
    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.D, c.eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.D, c.eps)
        self.mlp = MLP(c)

    def forward(self, x_TD: Tensor, *step: Any) -> Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), *step)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class Decoder(nn.Module):
    speeds_F: Tensor

    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.V, c.D)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.norm = RMSNorm(c.D, c.eps)
        self.register_buffer("speeds_F", c.rope.speeds(c.E), persistent=False)

    def forward(
        self, token_ids_T: Tensor, positions_T: Tensor, kv_caches: Sequence[Sequence[Tensor]], where: Sequence[Tensor]
    ) -> Tensor:
        x_TD = self.embed_tokens(token_ids_T)
        angles_TF = positions_T.unsqueeze(-1).float() * self.speeds_F
        angles_TE = torch.cat((angles_TF, angles_TF), -1)
        cos_TE, sin_TE = angles_TE.cos().to(x_TD.dtype), angles_TE.sin().to(x_TD.dtype)
        for layer, cache in zip(self.layers, kv_caches, strict=True):
            x_TD = layer(x_TD, cos_TE, sin_TE, cache, where)
        return self.norm(x_TD)


class Llama(nn.Module):
    """The whole model; `forward` takes one ragged step and returns logits (L, V) of the wanted rows."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        super().__init__()
        c = LlamaConfig.from_hf(raw)
        self.model = Decoder(c)
        self.lm_head = nn.Linear(c.D, c.V, bias=False)
        if c.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, token_ids: Tensor, positions: Tensor, kv_caches: Sequence[Sequence[Tensor]], slot_mapping: Tensor,
        block_table: Tensor, seq_lens: Tensor, query_starts: Tensor, logit_rows: Tensor,
    ) -> Tensor:  # fmt: skip
        x_TD = self.model(token_ids, positions, kv_caches, (slot_mapping, block_table, seq_lens, query_starts))
        return self.lm_head(x_TD[logit_rows])
