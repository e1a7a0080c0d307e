"""DeepSeek-V3's module that predicts one token more: a layer over what the model made of a token and the next token.

h' = M [norm(embed(t_{i+1})); norm(h_i)], one more layer, the head: logits of t_{i+2}. h_i is the model's last hidden
state after its final norm, as the checkpoint was trained.
Source: DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 2.2; the order of the two halves and the norm before it:
https://github.com/deepseek-ai/DeepSeek-V3/blob/main/README_WEIGHTS.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Block, Cache, RMSNorm, RopeTable, Sizes, Where
from .deepseek import latent_attention, mixture, v3_routing
from .hf_config import Reader
from .rope import Rope


class SharedHead(nn.Module):
    """A head that checkpoints store again: its values are the model's."""

    def __init__(self, c: Sizes) -> None:
        super().__init__()
        self.norm = RMSNorm(c.D, c.eps)
        self.head = nn.Linear(c.D, c.V, bias=False)


class FurtherToken(Block):
    """The module; its parameters are those under `model.layers.N.`, N the number of the model's layers."""

    def __init__(self, read: Reader, c: Sizes) -> None:
        super().__init__(c, latent_attention(read), mixture(read, c, v3_routing(read)))
        self.embed_tokens = nn.Embedding(c.V, c.D)
        self.enorm = RMSNorm(c.D, c.eps)
        self.hnorm = RMSNorm(c.D, c.eps)
        self.eh_proj = nn.Linear(2 * c.D, c.D, bias=False)
        self.shared_head = SharedHead(c)
        self.table = RopeTable(Rope.from_hf(read, read.size("qk_rope_head_dim")))

    def forward(  # type: ignore[override]  # a step of its own
        self, next_ids_T: Tensor, positions_T: Tensor, hidden_TD: Tensor, cache: Cache, where: Where, logit_rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return logits (L, V) of the token after next at the wanted rows, and the hidden states (T, D) after the norm.

        next_ids holds each token's successor, hidden what the model made of the token itself; the rest is as in a step.
        """
        embedded_TD = self.embed_tokens(next_ids_T)
        x_TD = self.eh_proj(torch.cat((self.enorm(embedded_TD), self.hnorm(hidden_TD)), -1))
        x_TD = super().forward(x_TD, self.table(positions_T, x_TD.dtype), cache, where)
        x_TD = self.shared_head.norm(x_TD)
        return self.shared_head.head(x_TD[logit_rows]), x_TD


def deepseek_mtp(raw: Mapping[str, Any]) -> FurtherToken:
    """Build the module. Raises ValueError for a model without, or for what these equations do not cover."""
    read = Reader(raw, "deepseek_v3")
    if read.size("num_nextn_predict_layers") != 1:
        raise ValueError(f"deepseek_v3: num_nextn_predict_layers is {raw['num_nextn_predict_layers']}, wanted 1")
    return FurtherToken(read, Sizes.from_hf(read))
