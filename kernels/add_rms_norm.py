"""Residual addition and RMSNorm of the sum, in one pass over memory.

Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467; the pre-norm residual block of Llama.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Cost, contract


@contract()
def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(s), s) with s = x + residual: both (T, D) in x's dtype.

    The sum is rounded to x's dtype before it is normalized, as the unfused ops do. Moves 4·T·D + D elements.
    """
    total_TD = x_TD + residual_TD
    wide_TD = total_TD.to(torch.promote_types(total_TD.dtype, torch.float32))
    scale_T1 = torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + eps)
    return (wide_TD * scale_T1).to(total_TD.dtype) * weight_D, total_TD


@add_rms_norm.costs
def cost(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> Cost:
    return Cost(bytes=4 * x_TD.nbytes + weight_D.nbytes, flops=5 * x_TD.numel())
