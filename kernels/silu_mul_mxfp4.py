"""The gated activation of SwiGLU experts, and MXFP4 quantization of its rows, in one pass over memory.

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202; `quantize_mxfp4` for the format.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import Build, contract
from .draw import Draw
from .quantize_mxfp4 import config, quantize_mxfp4, store_mxfp4
from .silu_mul import gated, refuses_gated, silu_mul


@contract(flops=lambda x_TI2: 9 * x_TI2.numel() // 2)
def silu_mul_mxfp4(x_TI2: Tensor) -> tuple[Tensor, Tensor]:
    """Return quantize_mxfp4(silu_mul(x)) of x (T, 2·I): codes (T, I/2) and scales (T, I/32), I a multiple of 32.

    The activation is rounded to x's dtype before it is quantized, so fused equals unfused. Moves 2·T·I elements and
    T·I/2 + T·I/32 bytes. Raises ValueError for another I.
    """
    return quantize_mxfp4.meaning(silu_mul.meaning(x_TI2))


@silu_mul_mxfp4.inputs(
    examples=({"T": 1, "I": 32}, {"T": 3, "I": 96}, {"T": 0, "I": 64}, {"T": 2, "I": 2080}),
    shapes={
        "gpt-oss-120b prefill": {"T": 16384, "I": 2880}, "deepseek-v3 experts decode": {"T": 512, "I": 2048},
    },
    sizes={"T": (0, 6), "I": [32, 160, 1056]},
    rows=(0,),
    fp4=(0,),
)  # fmt: skip
def make(draw: Draw, T: int, I: int) -> tuple[Any, ...]:
    return silu_mul.drawn(draw, T=T, I=I)


@triton.jit
def _silu_mul_mxfp4_kernel(x_ptr, out_ptr, scale_ptr, x_stride, I, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    column = start + tl.arange(0, BLOCK)  # [BLOCK]
    gate = tl.load(x_ptr + row * x_stride + column, mask=column < I, other=0.0)
    up = tl.load(x_ptr + row * x_stride + I + column, mask=column < I, other=0.0).to(tl.float32)
    activated = gated(gate.to(tl.float32), up, 0.0, 0.0, "silu").to(gate.dtype).to(tl.float32)
    out_at, scale_at = out_ptr + row * (I // 2) + start // 2, scale_ptr + row * (I // 32) + start // 32
    store_mxfp4(activated, out_at, scale_at, I - start, BLOCK)


silu_mul_mxfp4.builds([Build(_silu_mul_mxfp4_kernel, config(2880), {"out_ptr": "*u8", "scale_ptr": "*u8"})])


def _refuses(x_TI2: Tensor) -> str | None:
    if x_TI2.shape[-1] % 64 or x_TI2.dtype == torch.float64:
        return f"x must be two halves of 32·n columns of float32 or narrower, got {x_TI2.shape[-1]} of {x_TI2.dtype}"
    return None


@silu_mul_mxfp4.provider("triton", devices=("cuda",), refuses=(_refuses, refuses_gated), triton=True)
def silu_mul_mxfp4_triton(x_TI2: Tensor) -> tuple[Tensor, Tensor]:
    width = x_TI2.shape[-1] // 2
    out, scale = (torch.empty((*x_TI2.shape[:-1], width // n), dtype=torch.uint8, device=x_TI2.device) for n in (2, 32))
    if rows := x_TI2.numel() // (2 * width):
        chosen = config(width)
        grid = (rows, triton.cdiv(width, chosen["BLOCK"]))
        _silu_mul_mxfp4_kernel[grid](x_TI2, out, scale, x_TI2.stride(-2), width, **chosen)
    return out, scale
