"""Linear layers over int4 or int8 weights in groups, for 16-bit rows: the weight is widened in registers.

Source: Frantar et al. 2022, https://arxiv.org/abs/2210.17323 (GPTQ), and Lin et al. 2023,
https://arxiv.org/abs/2306.00978 (AWQ, with zero points); int4's layout is "pack-quantized" of compressed-tensors,
https://github.com/vllm-project/compressed-tensors; offsets are the minima of GGML's blocks, Q4_1 and Q4_K.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton
from seamwise.kernels.quant.dequantize_weight import dequantize_weight
from seamwise.kernels.quant.quantize_weight import quantize_weight, weight_scale
from seamwise.kernels.signature import cdiv

from .gemm_tiles import config, configs, grid, program_tile, refuses_wide, store_tile


def _limits(x_TK: Tensor, packed: Tensor, zero_NG: Tensor | None) -> str | None:
    columns = x_TK.shape[1] if packed.dtype == torch.int8 else cdiv(x_TK.shape[1], 8)
    if packed.shape[1] != columns:
        return f"packed has {packed.shape[1]} columns, wanted {columns} for {x_TK.shape[1]} of x"
    if zero_NG is not None and zero_NG.dtype != torch.int8 and not zero_NG.is_floating_point():
        return f"zero is {zero_NG.dtype}, wanted int8 or an offset in a floating dtype"
    return None


_GROUPS = "[N blocks(K,group)]"


@contract(
    args={"packed": "N W int8|int32!", "scale_NG": _GROUPS, "zero_NG": _GROUPS}, limits=_limits,
    flops=lambda x_TK, packed: 2 * x_TK.numel() * packed.shape[0],
    fake=lambda x_TK, packed: x_TK.new_empty((x_TK.shape[0], packed.shape[0])),
)  # fmt: skip
def w4a16_linear(
    x_TK: Tensor, packed: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, group: int, bias_N: Tensor | None = None
) -> Tensor:
    """Return x wᵀ + bias: (T, N) in x's dtype, for w = (int - zero) · scale or int · scale + zero; sums in float32.

    packed  int32 (N, ⌈K/8⌉): 8 values of -8 … 7 plus 8, the first in the lowest 4 bits; or int8 (N, K)
    scale   float (N, ⌈K/group⌉); group 0: one scale a row
    zero    of the scale's shape, as in `dequantize_weight`: int8, a zero point; floating, an offset; or None
    Moves T·K + T·N elements, N·K/2 or N·K bytes and the scales, and takes 2·T·N·K flops; float64 is summed in itself.
    Raises ValueError for other shapes.
    """
    wide, format = torch.promote_types(x_TK.dtype, torch.float32), "int8" if packed.dtype == torch.int8 else "int4"
    weight_NK = dequantize_weight.meaning(packed, scale_NG, zero_NG, format, 1, group, x_TK.shape[1], wide)
    out_TN = x_TK.to(wide) @ weight_NK.T
    return (out_TN if bias_N is None else out_TN + bias_N.to(wide)).to(x_TK.dtype)


@w4a16_linear.tuned_by
def key(x_TK: Tensor, packed: Tensor) -> tuple[int, int, int]:
    """Return (T, N, K)."""
    return x_TK.shape[0], packed.shape[0], x_TK.shape[1]


@w4a16_linear.inputs(
    examples=(
        {"T": 1, "N": 16, "K": 64, "group": 32}, {"T": 3, "N": 33, "K": 200, "group": 128, "zero": True},
        {"T": 0, "N": 8, "K": 8}, {"T": 5, "N": 70, "K": 44, "bias": True},
        {"T": 33, "N": 40, "K": 192, "group": 64, "zero": True},
        {"T": 2, "N": 33, "K": 96, "group": 32, "offset": True},
        {"T": 3, "N": 33, "K": 200, "group": 32, "format": "int8"},
    ),
    shapes={
        "llama-3-8b decode": {"T": 1, "N": 28672, "K": 4096, "group": 128},
        "llama-3-70b decode": {"T": 16, "N": 8192, "K": 28672, "group": 128},
        "llama-3-8b prefill": {"T": 4096, "N": 28672, "K": 4096, "group": 128},
        "llama-3-8b int8 decode": {"T": 1, "N": 28672, "K": 4096, "group": 128, "format": "int8"},
    },
    sizes={
        "T": (0, 20), "N": (1, 100), "K": [8, 33, 64, 192, 320], "group": [0, 32, 64, 128], "zero": [False, True],
        "bias": [False, True], "format": ["int4", "int8"], "offset": [False, True],
    },
    rows=(0,),
)  # fmt: skip
def make(
    draw: Draw, T: int, N: int, K: int, group: int = 0, zero: bool = False, bias: bool = False, format: str = "int4",
    offset: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """Draw zero points, or else offsets, where they are asked for."""
    x_TK, w_NK, bias_N = draw(T, K), draw.normal(N, K) * K**-0.5, draw(N)
    scale_NG = weight_scale(w_NK, format, 1, group)
    zero_NG = draw.integers(-8, 8, *scale_NG.shape, dtype=torch.int8) if zero else None
    if offset and not zero:
        zero_NG = (8 * scale_NG * draw.normal(*scale_NG.shape)).to(draw.dtype)
    packed = quantize_weight(w_NK, scale_NG, format, 1, group)
    return x_TK, packed, scale_NG.to(draw.dtype), zero_NG, group, bias_N if bias else None


@triton.jit
def unpack_tile(word, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the values -8 … 7 as float32 [BLOCK_N, BLOCK_K] of packed words [BLOCK_N, BLOCK_K / 8]."""
    shift = 4 * tl.arange(0, 8)
    nibble = (word[:, :, None] >> shift[None, None, :]) & 15
    return tl.reshape(nibble - 8, [BLOCK_N, BLOCK_K]).to(tl.float32)


@triton.jit
def _w4a16_kernel(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, T, N, K, groups, x_stride, packed_stride,
    group, INT8: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = program_tile(T, N, BLOCK_T, BLOCK_N, BAND)
    row = row_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    x_at, w_at = row.to(tl.int64) * x_stride, column.to(tl.int64) * packed_stride
    scale_at = column.to(tl.int64) * groups
    sums = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for begin in range(0, K, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        g = (begin + tl.arange(0, GROUPS) * (BLOCK_K // GROUPS)) // group  # the groups of this step
        x = tl.load(x_ptr + x_at[:, None] + k[None, :], mask=(row < T)[:, None] & (k < K)[None, :], other=0.0)
        if INT8:
            w_in = (column < N)[:, None] & (k < K)[None, :]
            w = tl.load(packed_ptr + w_at[:, None] + k[None, :], mask=w_in, other=0).to(tl.float32)
        else:
            word = begin // 8 + tl.arange(0, BLOCK_K // 8)
            w_in = (column < N)[:, None] & (word * 8 < K)[None, :]
            packed = tl.load(packed_ptr + w_at[:, None] + word[None, :], mask=w_in, other=0)
            w = unpack_tile(packed, BLOCK_N, BLOCK_K)
        scale_in = (column < N)[:, None] & (g < groups)[None, :]
        scale = tl.load(scale_ptr + scale_at[:, None] + g[None, :], mask=scale_in, other=0.0).to(tl.float32)
        w = tl.reshape(w, [BLOCK_N, GROUPS, BLOCK_K // GROUPS])
        if ZERO == "none":
            w = w * scale[:, :, None]
        else:
            zero = tl.load(zero_ptr + scale_at[:, None] + g[None, :], mask=scale_in, other=0).to(tl.float32)
            if ZERO == "point":
                w = (w - zero[:, :, None]) * scale[:, :, None]
            else:
                w = w * scale[:, :, None] + zero[:, :, None]
        w = tl.reshape(w, [BLOCK_N, BLOCK_K]).to(x.dtype)
        sums = tl.dot(x, tl.trans(w), sums, input_precision="ieee")
    store_tile(sums, out_ptr, bias_ptr, row, column, T, N, BIAS)


def depth(group: int, itemsize: int) -> dict[str, int]:
    """Return the columns of a step and how many groups they hold: the same for every T, by the order of sums."""
    block = 32 if itemsize == 4 else 64
    return {"BLOCK_K": block, "GROUPS": max(block // group, 1) if group else 1}


@w4a16_linear.builds
def builds(dtype: str) -> Iterator[Build]:
    itemsize = 4 if dtype == "fp32" else 2
    for chosen in configs(itemsize):
        for group, zero, int8 in ((128, "none", False), (32, "point", False), (32, "offset", True)):
            constants = {**chosen, **depth(group, itemsize), "INT8": int8, "ZERO": zero, "BIAS": True}
            types = {"packed_ptr": "*i8" if int8 else "*i32", "zero_ptr": "*i8" if zero == "point" else "*fp32"}
            yield Build(_w4a16_kernel, constants, types)


def _refuses(group: int) -> str | None:
    if group % 64 and group not in (16, 32):
        return f"group must be 16, 32 or a multiple of 64, or 0 for the row, got {group}"
    return None


@w4a16_linear.provider("triton", devices=("cuda",), refuses=(_refuses, refuses_wide), triton=True)
def w4a16_linear_triton(
    x_TK: Tensor, packed: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, group: int, bias_N: Tensor | None = None
) -> Tensor:
    T, K, N = *x_TK.shape, packed.shape[0]
    out_TN = torch.empty(T, N, dtype=x_TK.dtype, device=x_TK.device)
    zero = "none" if zero_NG is None else "offset" if zero_NG.is_floating_point() else "point"
    if T and N:
        chosen = {**config(T, N, x_TK.element_size()), **depth(group, x_TK.element_size())}
        _w4a16_kernel[grid(T, N, chosen)](
            x_TK, packed, scale_NG, zero_NG, bias_N, out_TN, T, N, K, scale_NG.shape[1], x_TK.stride(0),
            packed.stride(0), group or max(K, 1), INT8=packed.dtype == torch.int8, ZERO=zero, BIAS=bias_N is not None,
            **chosen,
        )  # fmt: skip
    return out_TN
