"""Residual addition and RMSNorm of the sum, in one pass over memory.

Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467; the pre-norm residual block of Llama.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import Build, Cost, contract, refuses_rows
from .rms_norm import config, inverse_rms, rms_norm, weighted


@contract()
def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(s), s) with s = x + residual: both (T, D) in x's dtype.

    The sum is rounded to x's dtype before it is normalized, and the weight multiplies, as in the unfused ops.
    Moves 4·T·D + D elements.
    """
    total_TD = x_TD + residual_TD
    return rms_norm.meaning(total_TD, weight_D, eps), total_TD


@add_rms_norm.costs
def cost(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> Cost:
    return Cost(bytes=4 * x_TD.nbytes + weight_D.nbytes, flops=5 * x_TD.numel())


@add_rms_norm.inputs(
    examples=({"T": 1, "D": 8}, {"T": 3, "D": 33}, {"T": 0, "D": 16}, {"T": 7, "D": 576}),
    shapes={"llama-3-8b prefill": {"T": 4096, "D": 4096}, "llama-3-70b decode": {"T": 64, "D": 8192}},
    sizes={"T": (0, 9), "D": (1, 600), "wide": [False, True]},
    rows=(0, 1),
)
def make(
    T: int, D: int, wide: bool = False, *, dtype: torch.dtype, device: str, seed: int
) -> tuple[Tensor, Tensor, Tensor, float]:
    """`wide` makes the weight float32, as Gemma's."""
    generator = torch.Generator(device).manual_seed(seed)
    x_TD, residual_TD = (torch.randn(T, D, generator=generator, device=device).to(dtype) for _ in range(2))
    weight_D = 1 + 0.1 * torch.randn(D, generator=generator, device=device)
    return x_TD, residual_TD, weight_D if wide else weight_D.to(dtype), 1e-5


@triton.jit
def _add_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, x_stride, residual_stride, D, eps, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < D
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    residual = tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0)
    total = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    tl.store(total_ptr + row * D + column, total, mask=inside)
    tl.store(out_ptr + row * D + column, weighted(total, inverse_rms(total, D, eps), weight), mask=inside)


@add_rms_norm.builds
def builds(dtype: str) -> Iterator[Build]:
    for width in (576, 4096, 8192, 16384):
        yield Build(_add_rms_norm_kernel, config(width), {"eps": "fp32"})


def refuses_add_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> str | None:
    if x_TD.shape != residual_TD.shape or x_TD.shape[-1] != weight_D.shape[0]:
        return f"x {tuple(x_TD.shape)}, residual {tuple(residual_TD.shape)}, weight {tuple(weight_D.shape)} do not fit"
    return refuses_rows(x=x_TD, residual=residual_TD)


@add_rms_norm.provider("triton", devices=("cuda",), refuses=refuses_add_norm, triton=True)
def add_rms_norm_triton(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    width = x_TD.shape[-1]
    out, total = (torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device) for _ in range(2))
    if rows := x_TD.numel() // width:
        _add_rms_norm_kernel[(rows,)](
            x_TD, residual_TD, weight_D, out, total, x_TD.stride(-2), residual_TD.stride(-2), width, eps,
            **config(width),
        )  # fmt: skip
    return out, total
