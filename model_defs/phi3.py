"""Phi-3, 3.5 and 4-mini: Llama whose checkpoints hold query, key and value as one matrix, and gate and up as another.

Heads may be rotated in their first columns only, at LongRoPE's speeds.
Source: Abdin et al. 2024, https://arxiv.org/abs/2404.14219.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from seamwise.kernels import attention, kv_append

from .blocks import Block, Cache, CausalLM, Sizes, Table, Where, activation, pre_norm_lm, rotate
from .hf_config import Reader
from .rope import Rope


class Attention(nn.Module):
    def __init__(self, c: Sizes, window: int) -> None:
        super().__init__()
        self.c, self.window = c, window
        self.qkv_proj = nn.Linear(c.D, (c.H + 2 * c.K) * c.E, bias=False)
        self.o_proj = nn.Linear(c.H * c.E, c.D, bias=False)

    def forward(self, x_TD: Tensor, table: Table, cache: Cache, where: Where) -> Tensor:
        slot_mapping_T, *spans = where
        heads = self.qkv_proj(x_TD).view(x_TD.shape[0], -1, self.c.E).split((self.c.H, self.c.K, self.c.K), 1)
        q_THE, k_TKE, v_TKE = rotate(heads[0], *table), rotate(heads[1], *table), heads[2]
        kv_append(k_TKE, v_TKE, *cache, slot_mapping_T)
        return self.o_proj(attention(q_THE, *cache, *spans, self.c.E**-0.5, self.window).flatten(1))


class MLP(nn.Module):
    def __init__(self, c: Sizes, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act
        self.gate_up_proj = nn.Linear(c.D, 2 * c.I, bias=False)
        self.down_proj = nn.Linear(c.I, c.D, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TI, up_TI = self.gate_up_proj(x_TD).chunk(2, -1)
        return self.down_proj(self.act(gate_TI) * up_TI)


def phi3(raw: Mapping[str, Any]) -> CausalLM:
    """Build the model. Raises ValueError for what these equations do not cover."""
    read = Reader(raw, "phi3")
    c, act = Sizes.from_hf(read), activation(read)
    window = read.size("sliding_window") if read.raw.get("sliding_window") is not None else 0
    blocks = [Block(c, Attention(c, window), MLP(c, act)) for _ in range(c.num_layers)]
    return pre_norm_lm(c, blocks, [Rope.from_hf(read, c.E)] * c.num_layers)
