"""The gated activation of SwiGLU MLPs: silu of the first half of the columns times the second half.

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Cost, contract


@contract()
def silu_mul(x_TI2: Tensor) -> Tensor:
    """Return silu(x[..., :I]) * x[..., I:] for x (T, 2·I): (T, I) in x's dtype, float32 or wider inside.

    Moves 3·T·I elements.
    """
    gate, up = x_TI2.to(torch.promote_types(x_TI2.dtype, torch.float32)).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(x_TI2.dtype)


@silu_mul.costs
def cost(x_TI2: Tensor) -> Cost:
    return Cost(bytes=x_TI2.nbytes * 3 // 2, flops=3 * x_TI2.numel())
