"""Linear layers over quantized rows and weights: float8 or int8 products, scaled.

A scale serves a row of x or 128 of its columns, and a channel, a block of 128 × 128 or the whole of the weight.
Products of 128 columns are summed by the tensor cores, and these sums in float32: a Hopper tensor core keeps 14 bits.

Source: DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 3.3; Micikevicius et al. 2022,
https://arxiv.org/abs/2209.05433.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton
from seamwise.kernels.quant.quantize import LIMITS, TRITON_TYPES, quantize_rows
from seamwise.kernels.quant.quantize_weight import expand_blocks, quantize_weight, weight_scale

from .gemm_tiles import config, configs, grid, load_tile, program_tile, store_tile

BLOCK = 128


def limits_quantized(x_TK: Tensor, w_NK: Tensor) -> str | None:
    """Return why x and w are not both float8 or both int8, or None."""
    if x_TK.dtype in LIMITS and w_NK.dtype == x_TK.dtype:
        return None
    return f"x is {x_TK.dtype}, w {w_NK.dtype}, wanted both float8_e4m3fn or both int8"


@contract(
    args={
        "x_scale_TG": "T 1|cdiv(K,128) float32",
        "w_scale": "N 1 or 1 1 or cdiv(N,128) cdiv(K,128) float32",
    },
    limits=limits_quantized, flops=lambda x_TK, w_NK: 2 * x_TK.numel() * w_NK.shape[0],
    fake=lambda x_TK, w_NK, dtype: x_TK.new_empty((x_TK.shape[0], w_NK.shape[0]), dtype=dtype),
)  # fmt: skip
def scaled_linear(
    x_TK: Tensor, x_scale_TG: Tensor, w_NK: Tensor, w_scale: Tensor, dtype: torch.dtype, bias_N: Tensor | None = None
) -> Tensor:
    """Return (x · x_scale) (w · w_scale)ᵀ + bias: (T, N) in `dtype`, summed in float32 or wider.

    x (T, K), w (N, K)  both float8_e4m3fn or both int8
    x_scale             float32 (T, 1), or (T, ⌈K/128⌉) for groups of 128 columns
    w_scale             float32 (N, 1), (1, 1), or (⌈N/128⌉, ⌈K/128⌉) for blocks of 128 × 128
    Moves T·K + N·K bytes, the scales and T·N elements, and takes 2·T·N·K flops. Raises ValueError for other dtypes or
    scales.
    """
    N, K = w_NK.shape
    wide = torch.promote_types(torch.promote_types(x_scale_TG.dtype, w_scale.dtype), torch.float32)
    x_scale_TK = x_scale_TG.repeat_interleave(BLOCK, 1)[:, :K] if x_scale_TG.shape[1] > 1 else x_scale_TG
    w_scale_NK = expand_blocks(w_scale, (N, K), BLOCK, BLOCK) if scales_blocks(w_scale, N, K) else w_scale
    out_TN = (x_TK.to(wide) * x_scale_TK) @ (w_NK.to(wide) * w_scale_NK).T
    return (out_TN if bias_N is None else out_TN + bias_N.to(wide)).to(dtype)


def scales_blocks(w_scale: Tensor, N: int, K: int) -> bool:
    """Return whether the weight's scales change along K or in steps of rows: neither a tensor's nor a channel's."""
    return w_scale.shape[1] > 1 or w_scale.shape[0] not in (1, N)


@scaled_linear.tuned_by
def key(x_TK: Tensor, x_scale_TG: Tensor, w_NK: Tensor, w_scale: Tensor) -> tuple[int, int, int, str]:
    """Return (T, N, K, kind): the kind is the dtype, and "blocks" where scales change along K."""
    blocks = " blocks" if x_scale_TG.shape[1] > 1 or w_scale.shape[1] > 1 else ""
    return x_TK.shape[0], *w_NK.shape, str(x_TK.dtype).removeprefix("torch.") + blocks


@scaled_linear.inputs(
    examples=(
        {"T": 1, "N": 16, "K": 32}, {"T": 3, "N": 33, "K": 70, "bias": True}, {"T": 0, "N": 16, "K": 16},
        {"T": 3, "N": 130, "K": 200, "x_group": 128, "rows": 128, "columns": 128},
        {"T": 2, "N": 40, "K": 130, "format": "int8", "rows": 1},
        {"T": 20, "N": 140, "K": 272, "rows": 1, "bias": True},
    ),
    shapes={
        "llama-3-8b decode": {"T": 16, "N": 6144, "K": 4096, "rows": 1},
        "llama-3-8b prefill": {"T": 4096, "N": 28672, "K": 4096, "rows": 1},
        "llama-3-8b int8 prefill": {"T": 4096, "N": 28672, "K": 4096, "rows": 1, "format": "int8"},
        "deepseek-v3 decode": {"T": 64, "N": 7168, "K": 2048, "x_group": 128, "rows": 128, "columns": 128},
        "deepseek-v3 prefill": {"T": 4096, "N": 7168, "K": 16384, "x_group": 128, "rows": 128, "columns": 128},
    },
    sizes={
        "T": (0, 20), "N": (1, 200), "K": [1, 16, 128, 200, 385], "format": ["float8_e4m3fn", "int8"],
        "x_group": [0, 128], "rows": [0, 1, 128], "columns": [0, 128], "bias": [False, True],
    },
    rows=(0, 1),
)  # fmt: skip
def make(
    draw: Draw, T: int, N: int, K: int, format: str = "float8_e4m3fn", x_group: int = 0, rows: int = 0,
    columns: int = 0, bias: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """The weight is scaled in (rows, columns): (128, 128) or, whatever `columns` says, (1, 0) or (0, 0)."""
    w_NK = draw.normal(N, K)
    blocks = (128, 128) if (rows, columns) == (128, 128) else (min(rows, 1), 0)
    scale = weight_scale(w_NK, format, *blocks)
    return (
        *quantize_rows(draw.normal(T, K), getattr(torch, format), x_group),
        quantize_weight(w_NK, scale, format, *blocks), scale, draw.dtype, draw(N) if bias else None,
    )  # fmt: skip


@triton.jit
def channelwise_tile(
    x_ptr, x_at, x_in, w_ptr, w_at, w_in, K, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """Return the unscaled sums of rows x_at times rows w_at as float32: SUM is tl.int32 for int8, else tl.float32."""
    sums = tl.zeros([BLOCK_T, BLOCK_N], SUM)
    for begin in range(0, K, BLOCK_K):
        x, w = load_tile(x_ptr, x_at, x_in, w_ptr, w_at, w_in, begin + tl.arange(0, BLOCK_K), K)
        sums = tl.dot(x, w, sums, max_num_imprecise_acc=BLOCK_K, out_dtype=SUM)
    return sums.to(tl.float32)


@triton.jit
def blockwise_tile(
    x_ptr, x_at, x_in, xs_ptr, xs_at, xs_group, w_ptr, w_at, w_in, ws_ptr, ws_group, K, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SUM: tl.constexpr, W_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Return the float32 sums of rows x_at times rows w_at, each step of BLOCK_K = 128 columns times its scales.

    xs_at are the rows' offsets in x's scales, ws_ptr is where the scales of this tile's block of weight rows begin;
    *_group is the distance to the next step's scale. W_BLOCKS False: the weight's scales are left to the caller.
    """
    sums = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for begin in range(0, K, BLOCK_K):
        x, w = load_tile(x_ptr, x_at, x_in, w_ptr, w_at, w_in, begin + tl.arange(0, BLOCK_K), K)
        scale = tl.load(xs_ptr + xs_at + begin // BLOCK_K * xs_group, mask=x_in, other=0.0)  # [BLOCK_T]
        if W_BLOCKS:
            scale *= tl.load(ws_ptr + begin // BLOCK_K * ws_group)
        sums += tl.dot(x, w, out_dtype=SUM).to(tl.float32) * scale[:, None]
    return sums


@triton.jit
def _channelwise_kernel(
    x_ptr, xs_ptr, w_ptr, ws_ptr, bias_ptr, out_ptr, T, N, K, x_stride, xs_stride, w_stride, ws_stride,
    BIAS: tl.constexpr, SUM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = program_tile(T, N, BLOCK_T, BLOCK_N, BAND)
    row = row_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    x_at, w_at = row.to(tl.int64) * x_stride, column.to(tl.int64) * w_stride
    sums = channelwise_tile(x_ptr, x_at, row < T, w_ptr, w_at, column < N, K, BLOCK_T, BLOCK_N, BLOCK_K, SUM)
    sums *= tl.load(xs_ptr + row.to(tl.int64) * xs_stride, mask=row < T, other=0.0)[:, None]
    sums *= tl.load(ws_ptr + column * ws_stride, mask=column < N, other=0.0)[None, :]
    store_tile(sums, out_ptr, bias_ptr, row, column, T, N, BIAS)


@triton.jit
def _blockwise_kernel(
    x_ptr, xs_ptr, w_ptr, ws_ptr, bias_ptr, out_ptr, T, N, K, x_stride, xs_stride, xs_group, w_stride, ws_stride,
    ws_group, BIAS: tl.constexpr, SUM: tl.constexpr, W_BLOCKS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = program_tile(T, N, BLOCK_T, BLOCK_N, BAND)
    row = row_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    x_at, w_at, xs_at = row.to(tl.int64) * x_stride, column.to(tl.int64) * w_stride, row.to(tl.int64) * xs_stride
    block = column_tile * BLOCK_N // BLOCK_K  # a tile is no wider than a block, and never across two
    sums = blockwise_tile(
        x_ptr, x_at, row < T, xs_ptr, xs_at, xs_group, w_ptr, w_at, column < N, ws_ptr + block * ws_stride, ws_group, K,
        BLOCK_T, BLOCK_N, BLOCK_K, SUM, W_BLOCKS,
    )  # fmt: skip
    if not W_BLOCKS:
        sums *= tl.load(ws_ptr + column * ws_stride, mask=column < N, other=0.0)[None, :]
    store_tile(sums, out_ptr, bias_ptr, row, column, T, N, BIAS)


@scaled_linear.builds
def builds(dtype: str) -> Iterator[Build]:
    for source, pointer in TRITON_TYPES.items():
        types = {"x_ptr": pointer, "w_ptr": pointer, "xs_ptr": "*fp32", "ws_ptr": "*fp32"}
        shared = {"BLOCK_K": BLOCK, "BIAS": True, "SUM": sum_type(source)}
        for chosen in configs(1):
            yield Build(_channelwise_kernel, {**shared, **chosen}, types)
            yield Build(_blockwise_kernel, {**shared, **chosen, "W_BLOCKS": True}, types)


def sum_type(dtype: torch.dtype) -> tl.dtype:
    return tl.float32 if dtype.is_floating_point else tl.int32


def gpu_before(major: int, minor: int = 0) -> bool:
    """Return whether the GPU here is older than a compute capability; False where there is none, as when tracing."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() < (major, minor)


def lacks_float8(x: Tensor) -> bool:
    """Return whether x is float8 on a GPU older than Ada, which cannot multiply it."""
    return x.dtype.is_floating_point and gpu_before(8, 9)


def refuses_scaled(x: Tensor, dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot multiply x to a result of this dtype, or None."""
    if lacks_float8(x):
        return "float8 needs compute capability 8.9"
    return None if dtype.is_floating_point else f"the result must be float, got {dtype}"


@scaled_linear.provider(
    "triton", devices=("cuda",), refuses=lambda x_TK, dtype: refuses_scaled(x_TK, dtype), triton=True
)
def scaled_linear_triton(
    x_TK: Tensor, x_scale_TG: Tensor, w_NK: Tensor, w_scale: Tensor, dtype: torch.dtype, bias_N: Tensor | None = None
) -> Tensor:
    T, (N, K) = x_TK.shape[0], w_NK.shape
    out_TN = torch.empty(T, N, dtype=dtype, device=x_TK.device)
    if not T or not N:
        return out_TN
    chosen = {**config(T, N, 1), "BLOCK_K": BLOCK, "BIAS": bias_N is not None, "SUM": sum_type(x_TK.dtype)}
    pointers = (x_TK, x_scale_TG, w_NK, w_scale, bias_N, out_TN, T, N, K, x_TK.stride(0), x_scale_TG.stride(0))
    ws_stride = w_scale.stride(0) if w_scale.shape[0] > 1 else 0
    blocks = scales_blocks(w_scale, N, K)
    if blocks or x_scale_TG.shape[1] > 1:
        xs_group = x_scale_TG.stride(1) if x_scale_TG.shape[1] > 1 else 0
        _blockwise_kernel[grid(T, N, chosen)](
            *pointers, xs_group, w_NK.stride(0), ws_stride, w_scale.stride(1), W_BLOCKS=blocks, **chosen
        )
    else:
        _channelwise_kernel[grid(T, N, chosen)](*pointers, w_NK.stride(0), ws_stride, **chosen)
    return out_TN
