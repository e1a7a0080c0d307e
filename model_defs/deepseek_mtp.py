"""DeepSeek-V3's module that predicts one token more: a layer over what the model made of a token and the next token.

h' = M [norm(embed(t_{i+1})); norm(h_i)], one more layer, the head: logits of t_{i+2}. h_i is the model's last hidden
state after its final norm, as the checkpoint was trained. Embedding and head are the model's own.
Source: DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 2.2; the order of the two halves and the norm before it:
https://github.com/deepseek-ai/DeepSeek-V3/blob/main/README_WEIGHTS.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Block, Cache, RMSNorm, RopeTable, Sizes, Where
from .deepseek import latent_attention, mixture, v3_routing
from .hf_config import Reader
from .rope import Rope

ARCHITECTURE = "DeepSeekMTPModel"


class SharedHead(nn.Module):
    """What is not the model's of the head that checkpoints store again."""

    def __init__(self, c: Sizes) -> None:
        super().__init__()
        self.norm = RMSNorm(c.D, c.eps)


class FurtherToken(Block):
    """The layer; its parameters are those under `model.layers.N.`, N the number of the model's layers."""

    def __init__(self, read: Reader, c: Sizes) -> None:
        super().__init__(c, latent_attention(read), mixture(read, c, v3_routing(read)))
        self.enorm = RMSNorm(c.D, c.eps)
        self.hnorm = RMSNorm(c.D, c.eps)
        self.eh_proj = nn.Linear(2 * c.D, c.D, bias=False)
        self.shared_head = SharedHead(c)
        self.table = RopeTable(Rope.from_hf(read, read.size("qk_rope_head_dim")))

    def forward(
        self, embedded_TD: Tensor, hidden_TD: Tensor, positions_T: Tensor, cache: Cache, where: Where
    ) -> Tensor:
        x_TD = self.eh_proj(torch.cat((self.enorm(embedded_TD), self.hnorm(hidden_TD)), -1))
        x_TD = super().forward(x_TD, self.table(positions_T, x_TD.dtype), cache, where)
        return self.shared_head.norm(x_TD)


class DeepSeekMTP(nn.Module):
    """A model of that one layer. Its KV cache is (latents (N, P, C + R), hidden states (N, P, D)) in blocks of P.

    forward takes a step as any model does. token_ids are the successors of the tokens at its positions; what the model
    made of these tokens themselves was written to the second cache, at the step's slots, before.
    """

    def __init__(self, read: Reader, c: Sizes) -> None:
        super().__init__()
        layers = nn.ModuleDict({str(c.num_layers): FurtherToken(read, c)})
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(c.V, c.D), "layers": layers})
        self.lm_head = nn.Linear(c.D, c.V, bias=False)

    def forward(
        self, token_ids: Tensor, positions: Tensor, kv_caches: Sequence[Cache], slot_mapping: Tensor,
        block_table: Tensor, seq_lens: Tensor, query_starts: Tensor, logit_rows: Tensor,
    ) -> Tensor:  # fmt: skip
        ((latents_NPE, hidden_NPD),) = kv_caches
        size = hidden_NPD.shape[1]
        hidden_TD = hidden_NPD[slot_mapping // size, slot_mapping % size]
        (layer,) = self.model["layers"].values()  # type: ignore[operator]
        where = (slot_mapping, block_table, seq_lens, query_starts)
        x_TD = layer(self.model["embed_tokens"](token_ids), hidden_TD, positions, (latents_NPE,), where)
        logits_LV: Tensor = self.lm_head(x_TD[logit_rows])
        return logits_LV


def deepseek_mtp(raw: Mapping[str, Any]) -> DeepSeekMTP:
    """Build the module. Raises ValueError for a model without, or for what these equations do not cover."""
    read = Reader(raw, "deepseek_v3")
    if read.size("num_nextn_predict_layers") != 1:
        raise ValueError(f"deepseek_v3: num_nextn_predict_layers is {raw['num_nextn_predict_layers']}, wanted 1")
    return DeepSeekMTP(read, Sizes.from_hf(read))
