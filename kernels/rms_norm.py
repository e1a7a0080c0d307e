"""RMSNorm over the last dimension of a matrix.

Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, equation 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Cost, contract


@contract()
def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x², last) + eps) * weight: (T, D) in x's dtype, statistics in float32 or wider.

    The normalized row is rounded to x's dtype before the weight multiplies it, as Hugging Face's LlamaRMSNorm does.
    Moves 2·T·D + D elements and takes 4·T·D flops.
    """
    wide_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    scale_T1 = torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + eps)
    return (wide_TD * scale_T1).to(x_TD.dtype) * weight_D


@rms_norm.costs
def cost(x_TD: Tensor, weight_D: Tensor, eps: float) -> Cost:
    return Cost(bytes=2 * x_TD.nbytes + weight_D.nbytes, flops=4 * x_TD.numel())
