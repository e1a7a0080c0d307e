"""Quantization of activations to MXFP4: blocks of 32 columns of float4 e2m1 that share a power of two.

Source: Open Compute Project 2023, Microscaling Formats (MX) v1.0, sections 5.2 to 6.3,
https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.activation.silu_mul import gated
from seamwise.kernels.contract import Build, contract, rows_of
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton


@contract(args={"x_TD": "*T 32*G"}, flops=lambda x_TD: 3 * x_TD.numel())
def quantize_mxfp4(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Return packed codes (T, D/2) and scales (T, D/32), both uint8, of x (T, D), D a multiple of 32.

    A scale byte s stands for 2^(s - 127): the exponent of the block's largest magnitude less 2, at least 0; a block
    with an infinity or NaN gets 255 (NaN) and codes of 0. A code is sign, 2 bits of exponent, 1 of mantissa, rounded to
    nearest, ties to even, and saturates at 6; column 2·i is the low half of byte i. float32 inside, in which all of it
    is exact. Moves T·D elements, T·D/2 + T·D/32 bytes. Raises ValueError for another D.
    """
    blocks = x_TD.float().unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)  # NaN where a column is NaN
    field = largest.view(torch.int32) >> 23  # the exponent, biased by 127
    magnitude = blocks.abs() * ((256 - field.clamp(2, 254)) << 23).view(torch.float32)
    small, middle = (2 * magnitude).round(), magnitude.round() + 2
    code = torch.where(magnitude < 2, small, torch.where(magnitude < 4, middle, (magnitude / 2).round() + 4))
    signed = code.clamp(max=7) + 8 * blocks.signbit()
    low, high = torch.where(field == 255, 0, signed).to(torch.uint8).flatten(-2).unflatten(-1, (-1, 2)).unbind(-1)
    scale = torch.where(field == 255, 255, (field - 2).clamp(min=0))
    return low | high << 4, scale.squeeze(-1).to(torch.uint8)


@quantize_mxfp4.inputs(
    examples=({"T": 1, "D": 32}, {"T": 3, "D": 96}, {"T": 0, "D": 64}, {"T": 2, "D": 2080}),
    shapes={"gpt-oss-120b prefill": {"T": 4096, "D": 2880}, "deepseek-v3 prefill": {"T": 4096, "D": 7168}},
    sizes={"T": (0, 6), "D": [32, 160, 1056]},
    rows=(0,),
    fp4=(0,),
)
def make(draw: Draw, T: int, D: int) -> tuple[Any, ...]:
    return (draw(T, D),)


@triton.jit
def _code(x, bits, inverse):
    """Return the e2m1 codes of float32 x times inverse, as int32."""
    magnitude = tl.abs(x) * inverse
    code = tl.where(magnitude < 4.0, _nearest(magnitude) + 2.0, _nearest(0.5 * magnitude) + 4.0)
    code = tl.where(magnitude < 2.0, _nearest(2.0 * magnitude), code)
    return tl.minimum(code, 7.0).to(tl.int32) | (bits >> 28) & 8


@triton.jit
def _nearest(x):
    return (x + 12582912.0) - 12582912.0  # 1.5 · 2^23: rounds to the nearest even integer


@triton.jit
def store_mxfp4(wide, out_ptr, scale_ptr, D, BLOCK: tl.constexpr):
    """Quantize a part of a row, float32 [BLOCK]; write D columns of it at out_ptr and their scales at scale_ptr."""
    even, odd = tl.split(tl.reshape(wide, [BLOCK // 32, 16, 2]))  # [BLOCK / 32, 16]
    even_bits, odd_bits = even.to(tl.int32, bitcast=True), odd.to(tl.int32, bitcast=True)
    # As integers, infinities and NaN are the largest magnitudes.
    largest = tl.max(tl.maximum(even_bits & 0x7FFFFFFF, odd_bits & 0x7FFFFFFF), 1)
    field = largest >> 23  # [BLOCK / 32]
    finite = tl.minimum(tl.maximum(field, 2), 254)
    inverse = ((256 - finite) << 23).to(tl.float32, bitcast=True)[:, None]
    packed = _code(even, even_bits, inverse) | _code(odd, odd_bits, inverse) << 4
    packed = tl.where(field[:, None] == 255, 0, packed)
    block = tl.arange(0, BLOCK // 32)
    at = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    scale = tl.where(field == 255, 255, tl.maximum(field - 2, 0))
    tl.store(out_ptr + at, packed.to(tl.uint8), mask=at < D // 2)
    tl.store(scale_ptr + block, scale.to(tl.uint8), mask=block < D // 32)


@triton.jit
def _quantize_mxfp4_kernel(x_ptr, out_ptr, scale_ptr, x_stride, D, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """Quantize D columns of a row; GATED: what silu_mul makes of D columns of gate and D of up."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    column = start + tl.arange(0, BLOCK)  # [BLOCK]
    x = tl.load(x_ptr + row * x_stride + column, mask=column < D, other=0.0)
    wide = x.to(tl.float32)
    if GATED:
        up = tl.load(x_ptr + row * x_stride + D + column, mask=column < D, other=0.0).to(tl.float32)
        wide = gated(wide, up, 0.0, 0.0, "silu").to(x.dtype).to(tl.float32)
    out_at, scale_at = out_ptr + row * (D // 2) + start // 2, scale_ptr + row * (D // 32) + start // 32
    store_mxfp4(wide, out_at, scale_at, D - start, BLOCK)


def config(D: int) -> dict[str, int]:
    """Launch configuration. Unmeasured: 1024 columns a program, 16-byte loads with 4 warps of bfloat16."""
    return {"BLOCK": min(triton.next_power_of_2(D), 1024), "num_warps": 4}


def mxfp4_build(D: int, *, gated: bool) -> Build:
    """Return the kernel's build."""
    return Build(_quantize_mxfp4_kernel, {"GATED": gated, **config(D)}, {"out_ptr": "*u8", "scale_ptr": "*u8"})


quantize_mxfp4.builds([mxfp4_build(7168, gated=False)])


def refuses_wide(x: Tensor) -> str | None:
    """Return why the kernel cannot serve x's dtype, or None."""
    return "x is float64, wanted float32 or narrower" if x.dtype == torch.float64 else None


def launch_mxfp4(x: Tensor, width: int, *, gated: bool) -> tuple[Tensor, Tensor]:
    """Launch the kernel, which makes `width` columns of each row of x."""
    out, scale = (torch.empty((*x.shape[:-1], width // n), dtype=torch.uint8, device=x.device) for n in (2, 32))
    rows, stride = rows_of(x)
    if rows:
        chosen = config(width)
        grid = (rows, triton.cdiv(width, chosen["BLOCK"]))
        _quantize_mxfp4_kernel[grid](x, out, scale, stride, width, GATED=gated, **chosen)
    return out, scale


@quantize_mxfp4.provider("triton", devices=("cuda",), refuses=lambda x_TD: refuses_wide(x_TD), triton=True)
def quantize_mxfp4_triton(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    return launch_mxfp4(x_TD, x_TD.shape[-1], gated=False)
