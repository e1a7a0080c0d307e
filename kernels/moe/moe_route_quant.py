"""Routing of tokens and quantization of the same tokens' rows, in one launch.

Rows are quantized once a token, not once a slot: the grouped GEMM gathers them quantized, and a dispatch to other ranks
sends them so, at half the bytes of bfloat16.

Source: DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 3.2.2 (dispatch in float8); `moe_route`, `quantize`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton
from seamwise.kernels.quant.quantize import (
    SCHEME,
    TRITON_TYPES,
    empty_quantized,
    limits_scheme,
    quantize,
    refuses_group,
    row_config,
    scheme,
    store_quantized,
)

from .moe_route import ROUTE_TYPES, ROUTES, empty_routes, limits_route, moe_route, route_config, store_route
from .moe_route import make as make_route


@contract(
    args=SCHEME, limits=(limits_route, limits_scheme),
    flops=lambda x_TD, logits_TE, top_k: 3 * x_TD.numel() + (4 + top_k) * logits_TE.numel(),
)  # fmt: skip
def moe_route_quant(
    x_TD: Tensor, logits_TE: Tensor, dtype: torch.dtype, group: int, top_k: int, score: str, normalize: bool = True,
    scaling: float = 1.0, bias_E: Tensor | None = None, num_groups: int = 0, top_groups: int = 0,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (weights, experts, q, x_scale): moe_route(logits, …) and quantize(x, dtype, group, scale).

    Moves what both move. Raises ValueError as both do.
    """
    routed = moe_route.meaning(logits_TE, top_k, score, normalize, scaling, bias_E, num_groups, top_groups)
    return *routed, *quantize.meaning(x_TD, dtype, group, scale)


@moe_route_quant.inputs(
    examples=(
        {"T": 1, "D": 16, "E": 8, "K": 2}, {"T": 3, "D": 33, "group": 16, "E": 33, "K": 8, "sigmoid": True},
        {"T": 0, "D": 8, "E": 8, "K": 2}, {"T": 2, "D": 40, "static": True, "E": 16, "K": 1, "biased": True},
        {"T": 4, "D": 300, "group": 128, "int8": True, "E": 24, "K": 4, "groups": 4, "sigmoid": True, "biased": True},
    ),
    shapes={
        "deepseek-v3 decode": {
            "T": 64, "D": 7168, "group": 128, "E": 256, "K": 8, "groups": 8, "sigmoid": True, "biased": True,
        },
        "qwen3-30b-a3b prefill": {"T": 4096, "D": 2048, "group": 128, "E": 128, "K": 8},
    },
    sizes={
        "T": (0, 6), "D": (1, 300), "group": [0, 16, 128], "int8": [False, True], "static": [False, True],
        "E": [8, 24], "K": (1, 4), "groups": [0, 4], "sigmoid": [False, True], "biased": [False, True],
    },
    rows=(0, 1),
)  # fmt: skip
def make(
    draw: Draw, T: int, D: int, E: int, K: int, group: int = 0, int8: bool = False, static: bool = False,
    groups: int = 0, sigmoid: bool = False, biased: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    logits_TE, *route = make_route(draw, T, E, K, groups, sigmoid, biased)
    quantized, group, scale = scheme(group, int8, static, draw.device)
    return draw(T, D), logits_TE, quantized, group, *route, scale


@triton.jit
def _moe_route_quant_kernel(
    x_ptr, logits_ptr, out_ptr, scale_ptr, static_ptr, bias_ptr, weights_ptr, experts_ptr, x_stride, logits_stride, T,
    D, scales, K, groups, size, top_groups, scaling, GROUP: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr,
    STATIC: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, BIASED: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The first T programs route a row each, which takes longest; the others quantize one each, meanwhile."""
    row = tl.program_id(0).to(tl.int64)
    if row < T:
        store_route(
            logits_ptr + row * logits_stride, bias_ptr, weights_ptr + row * K, experts_ptr + row * K, K, groups, size,
            top_groups, scaling, SIGMOID, NORMALIZE, BIASED, BLOCK_G, BLOCK_P, BLOCK_K,
        )  # fmt: skip
    else:
        row -= T
        column = tl.arange(0, BLOCK)  # [BLOCK]
        wide = tl.load(x_ptr + row * x_stride + column, mask=column < D, other=0.0).to(tl.float32)
        store_quantized(wide, out_ptr + row * D, scale_ptr + row * scales, static_ptr, D, GROUP, BLOCK, LIMIT, STATIC)


@moe_route_quant.builds
def builds(dtype: str) -> Iterator[Build]:
    for quantized, pointer in TRITON_TYPES.items():
        types = {"out_ptr": pointer, "scale_ptr": "*fp32", "static_ptr": "*fp32", **ROUTE_TYPES}
        for (group, static), route in zip(((0, False), (0, True), (128, False), (128, False)), ROUTES, strict=True):
            constants = {**row_config(7168, quantized, group, static), **route_config(*route)}
            yield Build(_moe_route_quant_kernel, constants, types)


@moe_route_quant.provider("triton", devices=("cuda",), triton=True, refuses=refuses_group)
def moe_route_quant_triton(
    x_TD: Tensor, logits_TE: Tensor, dtype: torch.dtype, group: int, top_k: int, score: str, normalize: bool = True,
    scaling: float = 1.0, bias_E: Tensor | None = None, num_groups: int = 0, top_groups: int = 0,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (rows, width), experts, groups = x_TD.shape, logits_TE.shape[1], num_groups or 1
    weights_TK, experts_TK = empty_routes(logits_TE, top_k)
    out, scales = empty_quantized(x_TD, dtype, group)
    if rows:
        _moe_route_quant_kernel[(2 * rows,)](
            x_TD, logits_TE, out, scales, scale, bias_E, weights_TK, experts_TK, x_TD.stride(0), logits_TE.stride(0),
            rows, width, scales.shape[1], top_k, groups, experts // groups, top_groups or 1, scaling,
            **row_config(width, dtype, group, scale is not None),
            **route_config(experts, top_k, score, normalize, bias_E is not None, num_groups),
        )  # fmt: skip
    return weights_TK, experts_TK, out, scales
