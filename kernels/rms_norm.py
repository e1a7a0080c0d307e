"""RMSNorm over the last dimension of a matrix.

Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, equation 4.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import Build, Cost, contract, refuses_rows


@contract()
def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x², last) + eps) * weight: (T, D) in x's dtype, statistics in float32 or wider.

    The normalized row is rounded to the weight's dtype before the weight multiplies it: x's dtype gives Hugging Face's
    LlamaRMSNorm; float32, with 1 + w as the weight, its GemmaRMSNorm.
    Moves 2·T·D + D elements and takes 4·T·D flops.
    """
    wide_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    scale_T1 = torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + eps)
    return ((wide_TD * scale_T1).to(weight_D.dtype) * weight_D).to(x_TD.dtype)


@rms_norm.costs
def cost(x_TD: Tensor, weight_D: Tensor, eps: float) -> Cost:
    return Cost(bytes=2 * x_TD.nbytes + weight_D.nbytes, flops=4 * x_TD.numel())


@rms_norm.inputs(
    examples=({"T": 1, "D": 8}, {"T": 3, "D": 33}, {"T": 0, "D": 16}, {"T": 7, "D": 576}),
    shapes={"llama-3-8b prefill": {"T": 4096, "D": 4096}, "llama-3-70b decode": {"T": 64, "D": 8192}},
    sizes={"T": (0, 9), "D": (1, 600), "wide": [False, True]},
    rows=(0,),
)
def make(
    T: int, D: int, wide: bool = False, *, dtype: torch.dtype, device: str, seed: int
) -> tuple[Tensor, Tensor, float]:
    """`wide` makes the weight float32, as Gemma's."""
    generator = torch.Generator(device).manual_seed(seed)
    x_TD = torch.randn(T, D, generator=generator, device=device)
    weight_D = 1 + 0.1 * torch.randn(D, generator=generator, device=device)
    return x_TD.to(dtype), weight_D if wide else weight_D.to(dtype), 1e-5


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
def norm_row(x_ptr, weight_ptr, out_ptr, D, eps, BLOCK: tl.constexpr):
    """Norm one row from x_ptr to out_ptr."""
    column = tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < D
    x = tl.load(x_ptr + column, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    tl.store(out_ptr + column, weighted(x, inverse_rms(x, D, eps), weight), mask=inside)


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, x_stride, D, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    norm_row(x_ptr + row * x_stride, weight_ptr, out_ptr + row * D, D, eps, BLOCK)


def config(D: int) -> dict[str, int]:
    """Launch configuration by row width. Unmeasured: a warp for each 512 elements keeps a row in registers."""
    block = triton.next_power_of_2(D)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


@rms_norm.builds
def builds(dtype: str) -> Iterator[Build]:
    for width in (576, 4096, 8192, 16384):
        yield Build(_rms_norm_kernel, config(width), {"eps": "fp32"})


def refuses_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> str | None:
    if x_TD.shape[-1] != weight_D.shape[0]:
        return f"weight has {weight_D.shape[0]} elements but x has {x_TD.shape[-1]} columns"
    return refuses_rows(x=x_TD)


@rms_norm.provider("triton", devices=("cuda",), refuses=refuses_norm, triton=True)
def rms_norm_triton(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    width = x_TD.shape[-1]
    out = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    if rows := x_TD.numel() // width:
        _rms_norm_kernel[(rows,)](x_TD, weight_D, out, x_TD.stride(-2), width, eps, **config(width))
    return out
