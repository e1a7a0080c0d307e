"""Linear layers of many experts over MXFP4 weights: `mxfp4_linear` for each expert, in one launch.

Source: gpt-oss, https://arxiv.org/abs/2508.10925, section 2.1; the gather inside the GEMM: Tan et al. 2024,
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
from seamwise.kernels.linear.gemm_tiles import refuses_wide, store_tile
from seamwise.kernels.linear.mxfp4_linear import mxfp4_linear, mxfp4_tile

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


@contract(
    args={"x_RK": "R 32*G", "packed": "E N 16*G uint8!", "scale_ENG": "E N G uint8!", **GROUPS}, opaque=True,
    fake=lambda x_RK, packed, top_k: x_RK.new_empty((x_RK.shape[0] * top_k, packed.shape[1])), reads_values=True,
)  # fmt: skip
def grouped_mxfp4_linear(
    x_RK: Tensor, packed: Tensor, scale_ENG: Tensor, order_S: Tensor, starts_E: Tensor, top_k: int,
    bias_EN: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return `grouped_linear` of x and weights e2m1 · 2^(scale - 127): (S, N) in x's dtype; sums in float32 or wider.

    packed  uint8 (E, N, K/2): two e2m1 floats, the first in the low 4 bits
    scale   uint8 (E, N, K/32): the exponents e8m0 of groups of 32 columns
    Moves R·K + S·N elements and N·K·17/32 bytes for each expert with slots; takes 2·S·N·K flops. Raises ValueError for
    other sizes.
    """
    return each_expert(
        order_S, starts_E, top_k, x_RK.new_zeros(order_S.shape[0], packed.shape[1]),
        lambda e, rows: mxfp4_linear.meaning(
            x_RK.index_select(0, rows), packed[e], scale_ENG[e], None if bias_EN is None else bias_EN[e]
        ),
    )  # fmt: skip


@grouped_mxfp4_linear.costs
def cost(
    x_RK: Tensor, packed: Tensor, scale_ENG: Tensor, order_S: Tensor, starts_E: Tensor, bias_EN: Tensor | None
) -> Cost:
    return grouped_cost((x_RK,), (packed, scale_ENG, bias_EN), order_S, starts_E, x_RK.dtype)


@grouped_mxfp4_linear.inputs(
    examples=(
        {"R": 1, "top_k": 2, "E": 16, "N": 33, "K": 32}, {"R": 5, "top_k": 2, "E": 3, "N": 48, "K": 96, "bias": True},
        {"R": 0, "top_k": 2, "E": 4, "N": 16, "K": 32}, {"R": 37, "top_k": 1, "E": 2, "N": 70, "K": 160},
    ),
    shapes={
        "gpt-oss-20b decode up": {"R": 8, "top_k": 4, "E": 32, "N": 5760, "K": 2880, "bias": True},
        "gpt-oss-120b prefill down": {"R": 16384, "top_k": 1, "E": 128, "N": 2880, "K": 2880, "bias": True},
    },
    sizes={"R": (0, 20), "top_k": [1, 3], "E": [1, 4], "N": (1, 100), "K": [32, 96, 160], "bias": [False, True]},
)  # fmt: skip
def make(draw: Draw, R: int, top_k: int, E: int, N: int, K: int, bias: bool = False) -> tuple[Any, ...]:
    packed = draw.integers(0, 256, E, N, K // 2, dtype=torch.uint8)
    scale_ENG = draw.integers(117, 126, E, N, K // 32, dtype=torch.uint8)
    bias_EN = draw(E, N) if bias else None
    return draw(R, K), packed, scale_ENG, *make_groups(draw, R, top_k, E), top_k, bias_EN


@triton.jit
def _grouped_mxfp4_kernel(
    x_ptr, packed_ptr, scale_ptr, bias_ptr, out_ptr, order_ptr, starts_ptr, x_stride, packed_expert_stride,
    packed_stride, scale_expert_stride, scale_stride, S, E, N, K, TOP_K: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert, slot = find_rows(order_ptr, starts_ptr, tl.program_id(1), S, E, BLOCK_E, BLOCK_T)
    if expert > E:
        return
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    if expert < E:
        x_at = (slot // TOP_K).to(tl.int64)[:, None] * x_stride
        row = column.to(tl.int64)[:, None]
        packed_at = expert.to(tl.int64) * packed_expert_stride + row * packed_stride
        scale_at = expert.to(tl.int64) * scale_expert_stride + row * scale_stride
        for begin in range(0, K, BLOCK_K):
            k = (begin + tl.arange(0, BLOCK_K))[None, :]
            pair = (begin // 2 + tl.arange(0, BLOCK_K // 2))[None, :]
            group = (begin // 32 + tl.arange(0, BLOCK_K // 32))[None, :]
            x = tl.load(x_ptr + x_at + k, mask=(slot < S)[:, None] & (k < K), other=0.0)
            packed = tl.load(packed_ptr + packed_at + pair, mask=(row < N) & (2 * pair < K), other=0)
            exponent = tl.load(scale_ptr + scale_at + group, mask=(row < N) & (32 * group < K), other=0)
            weight = mxfp4_tile(packed, exponent, BLOCK_N, BLOCK_K).to(x.dtype)
            sums = tl.dot(x, tl.trans(weight), sums, input_precision="ieee")
        if BIAS:
            bias_ptr += expert * N
        store_tile(sums, out_ptr, bias_ptr, slot, column, S, N, BIAS)
    else:
        store_tile(sums, out_ptr, bias_ptr, slot, column, S, N, False)


@grouped_mxfp4_linear.builds
def builds(dtype: str) -> Iterator[Build]:
    itemsize = 4 if dtype == "fp32" else 2
    for tiles in tile_configs(itemsize):
        constants = {**tiles, "BLOCK_K": 128 // itemsize, "TOP_K": 4, "BIAS": True}
        yield Build(_grouped_mxfp4_kernel, constants, {"packed_ptr": "*u8", "scale_ptr": "*u8", **GROUP_TYPES})


@grouped_mxfp4_linear.provider("triton", devices=("cuda",), refuses=lambda x_RK: refuses_wide(x_RK), triton=True)
def grouped_mxfp4_linear_triton(
    x_RK: Tensor, packed: Tensor, scale_ENG: Tensor, order_S: Tensor, starts_E: Tensor, top_k: int,
    bias_EN: Tensor | None = None,
) -> Tensor:  # fmt: skip
    (E, N, _), (slots,), K = packed.shape, order_S.shape, x_RK.shape[1]
    out_SN = torch.empty(slots, N, dtype=x_RK.dtype, device=x_RK.device)
    if slots:
        chosen = tile_config(slots, E, N, x_RK.element_size())
        _grouped_mxfp4_kernel[(triton.cdiv(N, chosen["BLOCK_N"]), num_tiles(slots, E, chosen["BLOCK_T"]))](
            x_RK, packed, scale_ENG, bias_EN, out_SN, order_S, starts_E, x_RK.stride(0), packed.stride(0),
            packed.stride(1), scale_ENG.stride(0), scale_ENG.stride(1), slots, E, N, K, TOP_K=top_k,
            BIAS=bias_EN is not None, **chosen,
        )  # fmt: skip
    return out_SN
