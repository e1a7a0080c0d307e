"""Layer normalization over the last dimension of a matrix.

Source: Ba, Kiros and Hinton 2016, https://arxiv.org/abs/1607.06450.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, contract, rows_of
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton

from .rms_norm import config


@contract(args={"x_TD": "*T D"}, flops=lambda x_TD: 7 * x_TD.numel())
def layer_norm(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
    """Return (x - mean) / sqrt(mean((x - mean)²) + eps) * weight + bias: (T, D) in x's dtype, rounded once.

    float32 or wider inside; a bias of None adds nothing. Moves 2·T·D + 2·D elements and takes 7·T·D flops.
    """
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    centred_TD = x_TD.to(wide) - x_TD.to(wide).mean(-1, keepdim=True)
    normed_TD = centred_TD * torch.rsqrt(centred_TD.square().mean(-1, keepdim=True) + eps) * weight_D.to(wide)
    return (normed_TD if bias_D is None else normed_TD + bias_D.to(wide)).to(x_TD.dtype)


@layer_norm.inputs(
    examples=({"T": 1, "D": 8}, {"T": 3, "D": 33, "bias": False}, {"T": 0, "D": 16}, {"T": 7, "D": 576}),
    shapes={"command-r-plus prefill": {"T": 4096, "D": 12288, "bias": False}, "phi-2 decode": {"T": 64, "D": 2560}},
    sizes={"T": (0, 9), "D": (1, 600), "bias": [False, True]},
    rows=(0,),
)
def make(draw: Draw, T: int, D: int, bias: bool = True) -> tuple[Any, ...]:
    return (draw.normal(T, D) + 1).to(draw.dtype), draw(D), draw(D) if bias else None, 1e-5


@triton.jit
def _layer_norm_kernel(x_ptr, weight_ptr, bias_ptr, out_ptr, x_stride, D, eps, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < D
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    centred = tl.where(inside, wide - tl.sum(wide, 0) / D, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / D + tl.cast(eps, tl.float32))
    normed = centred * scale * tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        normed += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * D + column, normed.to(x.dtype), mask=inside)


layer_norm.builds(
    Build(_layer_norm_kernel, {"BIAS": True, **config(width)}, {"eps": "fp32"}) for width in (576, 4096, 16384)
)


@layer_norm.provider("triton", devices=("cuda",), triton=True)
def layer_norm_triton(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
    (rows, stride), width = rows_of(x_TD), x_TD.shape[-1]
    out = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    if rows:
        _layer_norm_kernel[(rows,)](
            x_TD, weight_D, bias_D, out, stride, width, eps, BIAS=bias_D is not None, **config(width)
        )
    return out
