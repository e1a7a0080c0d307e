"""RMSNorm over the last dimension of a matrix.

Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, equation 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, contract, rows_of
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton


@contract(args={"x_TD": "*T D"}, flops=lambda x_TD: 4 * x_TD.numel())
def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x², last) + eps) * weight: (T, D) in x's dtype, statistics in float32 or wider.

    The normalized row is rounded to the weight's dtype before the weight multiplies it: x's dtype gives Hugging Face's
    LlamaRMSNorm; float32, with 1 + w as the weight, its GemmaRMSNorm.
    Moves 2·T·D + D elements and takes 4·T·D flops.
    """
    wide_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    scale_T1 = torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + eps)
    return ((wide_TD * scale_T1).to(weight_D.dtype) * weight_D).to(x_TD.dtype)


@rms_norm.inputs(
    examples=({"T": 1, "D": 8}, {"T": 3, "D": 33}, {"T": 0, "D": 16}, {"T": 7, "D": 576}),
    shapes={"llama-3-8b prefill": {"T": 4096, "D": 4096}, "llama-3-70b decode": {"T": 64, "D": 8192}},
    sizes={"T": (0, 9), "D": (1, 600), "wide": [False, True]},
    rows=(0,),
)
def make(draw: Draw, T: int, D: int, wide: bool = False) -> tuple[Any, ...]:
    return draw(T, D), norm_weight(draw, D, wide), 1e-5


def norm_weight(draw: Draw, D: int, wide: bool = False) -> Tensor:
    """Draw a norm's weight; `wide` makes it float32, as Gemma's."""
    weight_D = 1 + 0.1 * draw.normal(D)
    return weight_D if wide else weight_D.to(draw.dtype)


@triton.jit
def inverse_rms(x, D, eps):
    """Return 1 / sqrt(mean(x²) + eps) of rows [..., BLOCK] with zeros beyond D: float32 [..., 1]."""
    wide = x.to(tl.float32)
    return tl.rsqrt(tl.sum(wide * wide, -1, keep_dims=True) / D + tl.cast(eps, tl.float32))


@triton.jit
def weighted(x, scale, weight):
    """Return x * scale * weight in x's dtype, rounded to the weight's dtype before the weight."""
    return ((x.to(tl.float32) * scale).to(weight.dtype).to(tl.float32) * weight.to(tl.float32)).to(x.dtype)


@triton.jit
def row_total(x_ptr, residual_ptr, total_ptr, column, D):
    """Return the row at x_ptr; with a residual, their sum in x's dtype, which is stored at total_ptr."""
    x = tl.load(x_ptr + column, mask=column < D, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + column, mask=column < D, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + column, x, mask=column < D)
    return x


@triton.jit
def norm_row(x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, D, eps, BLOCK: tl.constexpr):
    """Norm one row from x_ptr, or the sum of it and a residual, to out_ptr."""
    column = tl.arange(0, BLOCK)  # [BLOCK]
    total = row_total(x_ptr, residual_ptr, total_ptr, column, D)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0)
    tl.store(out_ptr + column, weighted(total, inverse_rms(total, D, eps), weight), mask=column < D)


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, x_stride, residual_stride, D, eps, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    residual_at = residual_ptr + row * residual_stride if residual_ptr is not None else None
    total_at = total_ptr + row * D if total_ptr is not None else None
    norm_row(x_ptr + row * x_stride, residual_at, weight_ptr, out_ptr + row * D, total_at, D, eps, BLOCK)


def config(D: int) -> dict[str, int]:
    """Launch configuration by row width. Unmeasured: a warp for each 512 elements keeps a row in registers."""
    block = triton.next_power_of_2(D)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def norm_builds(constants: dict[str, None]) -> Iterator[Build]:
    """Yield the kernel's builds, with None for the pointers that are not in use."""
    for width in (576, 4096, 8192, 16384):
        yield Build(_rms_norm_kernel, {**config(width), **constants}, {"eps": "fp32"})


rms_norm.builds(norm_builds({"residual_ptr": None, "total_ptr": None}))


def launch_norm(x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(s), s) with s = x, + residual where given."""
    (rows, x_stride), width = rows_of(x_TD), x_TD.shape[-1]
    residual_stride = 0 if residual_TD is None else rows_of(residual_TD)[1]
    out = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    total = None if residual_TD is None else torch.empty_like(out)
    if rows:
        _rms_norm_kernel[(rows,)](
            x_TD, residual_TD, weight_D, out, total, x_stride, residual_stride, width, eps, **config(width)
        )
    return out, x_TD if total is None else total


@rms_norm.provider("triton", devices=("cuda",), triton=True)
def rms_norm_triton(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return launch_norm(x_TD, None, weight_D, eps)[0]
