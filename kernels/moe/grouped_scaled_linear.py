"""Linear layers of many experts over quantized rows and weights: `scaled_linear` for each expert, in one launch.

Source: DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 3.3; the gather inside the GEMM: Tan et al. 2024,
https://arxiv.org/abs/2403.08245.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, Cost, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton
from seamwise.kernels.linear.gemm_tiles import store_tile
from seamwise.kernels.linear.scaled_linear import (
    BLOCK,
    blockwise_tile,
    channelwise_tile,
    limits_quantized,
    refuses_scaled,
    scaled_linear,
    scales_blocks,
    sum_type,
)
from seamwise.kernels.quant.quantize import TRITON_TYPES, quantize_rows
from seamwise.kernels.quant.quantize_weight import quantize_weight, weight_scale

from .grouped_linear import (
    GROUP_TYPES,
    GROUPS,
    each_expert,
    find_rows,
    grouped_cost,
    num_tiles,
    tile_config,
    tile_configs,
)
from .moe_align import make_groups


def _fake(x_RK: Tensor, weight_ENK: Tensor, top_k: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(x_RK.shape[0] * top_k, weight_ENK.shape[1], dtype=dtype, device=x_RK.device)


_W_SCALE = "E N 1 or E 1 1 or E cdiv(N,128) cdiv(K,128) float32"


@contract(
    args={"x_scale_RG": "R 1|cdiv(K,128) float32", "w_scale": _W_SCALE, **GROUPS}, opaque=True, fake=_fake,
    reads_values=True, limits=lambda x_RK, weight_ENK: limits_quantized(x_RK, weight_ENK),
)  # fmt: skip
def grouped_scaled_linear(
    x_RK: Tensor, x_scale_RG: Tensor, weight_ENK: Tensor, w_scale: Tensor, order_S: Tensor, starts_E: Tensor,
    top_k: int, dtype: torch.dtype, bias_EN: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return `grouped_linear` of x · x_scale and weight · w_scale: (S, N) in `dtype`, summed in float32 or wider.

    x (R, K), weight (E, N, K)  both float8_e4m3fn or both int8; x is quantized once a token, whatever its experts
    x_scale                     float32 (R, 1), or (R, ⌈K/128⌉) for groups of 128 columns
    w_scale                     float32 (E, N, 1), (E, 1, 1), or (E, ⌈N/128⌉, ⌈K/128⌉) for blocks of 128 × 128
    Moves R·K bytes, the experts' weights, the scales and S·N elements; takes 2·S·N·K flops. Raises ValueError for
    other dtypes or sizes.
    """
    return each_expert(
        order_S, starts_E, top_k, x_scale_RG.new_zeros(order_S.shape[0], weight_ENK.shape[1], dtype=dtype),
        lambda e, rows: scaled_linear.meaning(
            x_RK.index_select(0, rows), x_scale_RG.index_select(0, rows), weight_ENK[e], w_scale[e], dtype,
            None if bias_EN is None else bias_EN[e],
        ),
    )  # fmt: skip


@grouped_scaled_linear.costs
def cost(
    x_RK: Tensor, x_scale_RG: Tensor, weight_ENK: Tensor, w_scale: Tensor, order_S: Tensor, starts_E: Tensor,
    dtype: torch.dtype, bias_EN: Tensor | None,
) -> Cost:  # fmt: skip
    return grouped_cost((x_RK, x_scale_RG), (weight_ENK, w_scale, bias_EN), order_S, starts_E, dtype)


@grouped_scaled_linear.inputs(
    examples=(
        {"R": 1, "top_k": 2, "E": 16, "N": 33, "K": 40}, {"R": 5, "top_k": 2, "E": 3, "N": 48, "K": 70, "bias": True},
        {"R": 0, "top_k": 2, "E": 4, "N": 16, "K": 16}, {"R": 19, "top_k": 1, "E": 2, "N": 70, "K": 33, "rows": 1},
        {"R": 7, "top_k": 2, "E": 3, "N": 140, "K": 200, "x_group": 128, "rows": 128},
        {"R": 6, "top_k": 1, "E": 4, "N": 20, "K": 130, "format": "int8", "rows": 1, "bias": True},
        {"R": 9, "top_k": 2, "E": 3, "N": 32, "K": 48, "rows": 1},
    ),
    shapes={
        "deepseek-v3 decode up": {"R": 64, "top_k": 8, "E": 256, "N": 4096, "K": 7168, "x_group": 128, "rows": 128},
        "deepseek-v3 prefill down": {"R": 32768, "top_k": 1, "E": 256, "N": 7168, "K": 2048, "rows": 128},
        "mixtral-8x7b prefill up": {"R": 4096, "top_k": 2, "E": 8, "N": 28672, "K": 4096, "rows": 1},
    },
    sizes={
        "R": (0, 20), "top_k": [1, 3], "E": [1, 4], "N": (1, 200), "K": [1, 16, 200], "rows": [0, 1, 128],
        "x_group": [0, 128], "format": ["float8_e4m3fn", "int8"], "bias": [False, True],
    },
)  # fmt: skip
def make(
    draw: Draw, R: int, top_k: int, E: int, N: int, K: int, format: str = "float8_e4m3fn", x_group: int = 0,
    rows: int = 0, bias: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """`rows` 0, 1 and 128: weights are scaled by expert, by channel, in blocks of 128 × 128."""
    weight_ENK = draw.normal(E, N, K)
    blocks = (128, 128) if rows == 128 else (rows, 0)
    scales = [weight_scale(w, format, *blocks) for w in weight_ENK]
    quantized = [quantize_weight(w, s, format, *blocks) for w, s in zip(weight_ENK, scales, strict=True)]
    return (
        *quantize_rows(draw.normal(R, K), getattr(torch, format), x_group), torch.stack(quantized),
        torch.stack(scales), *make_groups(draw, R, top_k, E), top_k, draw.dtype, draw(E, N) if bias else None,
    )  # fmt: skip


@triton.jit
def _grouped_scaled_kernel(
    x_ptr, xs_ptr, w_ptr, ws_ptr, bias_ptr, out_ptr, order_ptr, starts_ptr, x_stride, xs_stride, xs_group, we_stride,
    w_stride, wse_stride, ws_stride, ws_group, S, E, N, K, TOP_K: tl.constexpr, BIAS: tl.constexpr, SUM: tl.constexpr,
    IN_STEPS: tl.constexpr, W_BLOCKS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """IN_STEPS: some scale changes along K; W_BLOCKS: it is the weight's, or its rows share theirs by 128."""
    expert, slot = find_rows(order_ptr, starts_ptr, tl.program_id(1), S, E, BLOCK_E, BLOCK_T)
    if expert > E:
        return
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if expert < E:
        row = (slot // TOP_K).to(tl.int64)
        x_at, xs_at, w_at = row * x_stride, row * xs_stride, column.to(tl.int64) * w_stride
        w_ptr += expert.to(tl.int64) * we_stride
        ws_ptr += expert * wse_stride
        if IN_STEPS:
            block = tl.program_id(0) * BLOCK_N // BLOCK_K  # a tile is no wider than a block, and never across two
            sums = blockwise_tile(
                x_ptr, x_at, slot < S, xs_ptr, xs_at, xs_group, w_ptr, w_at, column < N, ws_ptr + block * ws_stride,
                ws_group, K, BLOCK_T, BLOCK_N, BLOCK_K, SUM, W_BLOCKS,
            )  # fmt: skip
        else:
            sums = channelwise_tile(
                x_ptr, x_at, slot < S, w_ptr, w_at, column < N, K, BLOCK_T, BLOCK_N, BLOCK_K, SUM
            )  # fmt: skip
            sums *= tl.load(xs_ptr + xs_at, mask=slot < S, other=0.0)[:, None]
        if not W_BLOCKS:
            sums *= tl.load(ws_ptr + column * ws_stride, mask=column < N, other=0.0)[None, :]
        if BIAS:
            bias_ptr += expert * N
        store_tile(sums, out_ptr, bias_ptr, slot, column, S, N, BIAS)
    else:
        store_tile(tl.zeros([BLOCK_T, BLOCK_N], tl.float32), out_ptr, bias_ptr, slot, column, S, N, False)


def _builds() -> Iterator[Build]:
    for source, pointer in TRITON_TYPES.items():
        types = {"x_ptr": pointer, "w_ptr": pointer, "xs_ptr": "*fp32", "ws_ptr": "*fp32", **GROUP_TYPES}
        constants = {"BLOCK_K": BLOCK, "TOP_K": 8, "BIAS": True, "SUM": sum_type(source)}
        for tiles in tile_configs(1):
            for blocks in (False, True):
                chosen = {**tiles, **constants, "IN_STEPS": blocks, "W_BLOCKS": blocks}
                yield Build(_grouped_scaled_kernel, chosen, types)


grouped_scaled_linear.builds(lambda dtype: _builds())


@grouped_scaled_linear.provider(
    "triton", devices=("cuda",), refuses=lambda x_RK, dtype: refuses_scaled(x_RK, dtype), triton=True
)
def grouped_scaled_linear_triton(
    x_RK: Tensor, x_scale_RG: Tensor, weight_ENK: Tensor, w_scale: Tensor, order_S: Tensor, starts_E: Tensor,
    top_k: int, dtype: torch.dtype, bias_EN: Tensor | None = None,
) -> Tensor:  # fmt: skip
    (E, N, K), slots = weight_ENK.shape, order_S.shape[0]
    out_SN = torch.empty(slots, N, dtype=dtype, device=x_RK.device)
    if slots:
        chosen = {**tile_config(slots, E, N, 1), "BLOCK_K": BLOCK}
        groups, blocks = x_scale_RG.shape[1] > 1, scales_blocks(w_scale[0], N, K)
        _grouped_scaled_kernel[(triton.cdiv(N, chosen["BLOCK_N"]), num_tiles(slots, E, chosen["BLOCK_T"]))](
            x_RK, x_scale_RG, weight_ENK, w_scale, bias_EN, out_SN, order_S, starts_E, x_RK.stride(0),
            x_scale_RG.stride(0), x_scale_RG.stride(1) if groups else 0, weight_ENK.stride(0), weight_ENK.stride(1),
            w_scale.stride(0), w_scale.stride(1) if w_scale.shape[1] > 1 else 0, w_scale.stride(2), slots, E, N, K,
            TOP_K=top_k, BIAS=bias_EN is not None, SUM=sum_type(x_RK.dtype), IN_STEPS=groups or blocks,
            W_BLOCKS=blocks, **chosen,
        )  # fmt: skip
    return out_SN
