"""Linear layers over MXFP4 weights: 4-bit floats in groups of 32 columns that share a power of two.

Source: OCP Microscaling Formats v1.0, sections 5 and 6,
https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf; the layout is gpt-oss's,
https://huggingface.co/openai/gpt-oss-20b, as transformers' integrations/mxfp4.py reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton

from .gemm_tiles import config, configs, grid, program_tile, refuses_wide, store_tile

GROUP = 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # and their negatives, with the fourth bit


@contract(
    args={"x_TK": "T 32*G", "packed": "N 16*G uint8!", "scale_NG": "N G uint8!"},
    flops=lambda x_TK, packed: 2 * x_TK.numel() * packed.shape[0],
)
def mxfp4_linear(x_TK: Tensor, packed: Tensor, scale_NG: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Return x wᵀ + bias: (T, N) in x's dtype, for w = e2m1 · 2^(scale - 127); sums in float32 or wider.

    packed  uint8 (N, K/2): two e2m1 floats, the first in the low 4 bits
    scale   uint8 (N, K/32): the exponents e8m0 of groups of 32 columns, 255 for NaN
    Moves T·K + T·N elements and N·K·17/32 bytes, and takes 2·T·N·K flops. Raises ValueError for other shapes.
    """
    wide = torch.promote_types(x_TK.dtype, torch.float32)
    out_TN = x_TK.to(wide) @ dequantize_mxfp4(packed, scale_NG, wide).T
    return (out_TN if bias_N is None else out_TN + bias_N.to(wide)).to(x_TK.dtype)


def dequantize_mxfp4(packed: Tensor, scale_NG: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight (…, K) of packed (…, K/2) and its scales (…, K/32); a scale of 255 is NaN."""
    values = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=dtype, device=packed.device)
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).unflatten(-1, (-1, GROUP))
    weight = torch.ldexp(values[codes.int()], scale_NG.int().unsqueeze(-1) - 127)
    return weight.masked_fill((scale_NG == 255).unsqueeze(-1), torch.nan).flatten(-2)


@mxfp4_linear.tuned_by
def key(x_TK: Tensor, packed: Tensor) -> tuple[int, int, int]:
    """Return (T, N, K)."""
    return x_TK.shape[0], packed.shape[0], x_TK.shape[1]


@mxfp4_linear.inputs(
    examples=(
        {"T": 1, "N": 16, "K": 32}, {"T": 3, "N": 33, "K": 96, "bias": True}, {"T": 0, "N": 8, "K": 32},
        {"T": 20, "N": 70, "K": 160},
    ),
    shapes={
        "gpt-oss-20b decode": {"T": 8, "N": 5760, "K": 2880, "bias": True},
        "gpt-oss-20b prefill": {"T": 4096, "N": 5760, "K": 2880, "bias": True},
    },
    sizes={"T": (0, 20), "N": (1, 100), "K": [32, 64, 96, 320], "bias": [False, True]},
    rows=(0,),
)  # fmt: skip
def make(draw: Draw, T: int, N: int, K: int, bias: bool = False) -> tuple[Any, ...]:
    x_TK, bias_N = draw(T, K), draw(N)
    packed = draw.integers(0, 256, N, K // 2, dtype=torch.uint8)
    scale_NG = draw.integers(117, 126, N, K // GROUP, dtype=torch.uint8)
    return x_TK, packed, scale_NG, bias_N if bias else None


@triton.jit
def mxfp4_tile(byte, exponent, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the weights as float32 [BLOCK_N, BLOCK_K] of bytes [BLOCK_N, BLOCK_K / 2], scales [BLOCK_N, BLOCK_K / 32].

    The bits s e e m, placed at the sign and the ends of float16's exponent and fraction, are the value times 2^-14,
    subnormal 0.5 included: cheaper than a table of 16, which registers cannot index.
    """
    code = (byte.to(tl.uint16)[:, :, None] >> (4 * tl.arange(0, 2)).to(tl.uint16)[None, None, :]) & 15
    half = (((code & 7) << 9) | ((code & 8) << 12)).to(tl.uint16).to(tl.float16, bitcast=True)
    value = tl.reshape(half.to(tl.float32) * 16384.0, [BLOCK_N, BLOCK_K // 32, 32])
    bits = exponent.to(tl.int32) << 23
    bits = tl.where(exponent == 255, 0x7FC00000, tl.where(bits == 0, 0x400000, bits))  # NaN; 2^-127 is subnormal
    scale = bits.to(tl.float32, bitcast=True)
    return tl.reshape(value * scale[:, :, None], [BLOCK_N, BLOCK_K])


@triton.jit
def _mxfp4_kernel(
    x_ptr, packed_ptr, scale_ptr, bias_ptr, out_ptr, T, N, K, x_stride, packed_stride, scale_stride,
    BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = program_tile(T, N, BLOCK_T, BLOCK_N, BAND)
    row = row_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    x_at = row.to(tl.int64)[:, None] * x_stride
    packed_at, scale_at = column.to(tl.int64)[:, None] * packed_stride, column.to(tl.int64)[:, None] * scale_stride
    row_in, column_in = (row < T)[:, None], (column < N)[:, None]
    sums = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for begin in range(0, K, BLOCK_K):
        k = (begin + tl.arange(0, BLOCK_K))[None, :]
        pair = (begin // 2 + tl.arange(0, BLOCK_K // 2))[None, :]
        g = (begin // 32 + tl.arange(0, BLOCK_K // 32))[None, :]
        x = tl.load(x_ptr + x_at + k, mask=row_in & (k < K), other=0.0)
        packed = tl.load(packed_ptr + packed_at + pair, mask=column_in & (2 * pair < K), other=0)
        exponent = tl.load(scale_ptr + scale_at + g, mask=column_in & (32 * g < K), other=0)
        w = mxfp4_tile(packed, exponent, BLOCK_N, BLOCK_K).to(x.dtype)
        sums = tl.dot(x, tl.trans(w), sums, input_precision="ieee")
    store_tile(sums, out_ptr, bias_ptr, row, column, T, N, BIAS)


@mxfp4_linear.builds
def builds(dtype: str) -> Iterator[Build]:
    itemsize = 4 if dtype == "fp32" else 2
    for chosen in configs(itemsize):
        constants = {**chosen, "BLOCK_K": 128 // itemsize, "BIAS": True}
        yield Build(_mxfp4_kernel, constants, {"packed_ptr": "*u8", "scale_ptr": "*u8"})


@mxfp4_linear.provider("triton", devices=("cuda",), refuses=refuses_wide, triton=True)
def mxfp4_linear_triton(x_TK: Tensor, packed: Tensor, scale_NG: Tensor, bias_N: Tensor | None = None) -> Tensor:
    T, K, N = *x_TK.shape, packed.shape[0]
    out_TN = torch.empty(T, N, dtype=x_TK.dtype, device=x_TK.device)
    if T and N:
        chosen = {**config(T, N, x_TK.element_size()), "BLOCK_K": 128 // x_TK.element_size()}
        _mxfp4_kernel[grid(T, N, chosen)](
            x_TK, packed, scale_NG, bias_N, out_TN, T, N, K, x_TK.stride(0), packed.stride(0), scale_NG.stride(0),
            BIAS=bias_N is not None, **chosen,
        )  # fmt: skip
    return out_TN
