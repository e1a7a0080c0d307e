"""Rotary position embedding, neox halves.

Source: Su et al. 2021, https://arxiv.org/abs/2104.09864; the half-split layout of GPT-NeoX and Llama checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Cost, contract


@contract()
def rope(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Return x * cos + cat(-x[..., D/2:], x[..., :D/2]) * sin: (T, H, D) in x's dtype, float32 or wider inside.

    cos and sin are full width (T, D), one row a token, shared by the heads. Moves 2·T·H·D + 2·T·D elements.
    """
    wide = torch.promote_types(x_THD.dtype, torch.float32)
    x, cos, sin = x_THD.to(wide), cos_TD.to(wide).unsqueeze(-2), sin_TD.to(wide).unsqueeze(-2)
    low, high = x.chunk(2, -1)
    return (x * cos + torch.cat((-high, low), -1) * sin).to(x_THD.dtype)


@rope.costs
def cost(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Cost:
    return Cost(bytes=2 * x_THD.nbytes + cos_TD.nbytes + sin_TD.nbytes, flops=3 * x_THD.numel())
