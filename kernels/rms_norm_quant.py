"""RMSNorm and quantization of the normed rows, in one pass over memory.

Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467; `quantize` for the scheme.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import Build, Cost, contract
from .quantize import (
    empty_quantized,
    quantize,
    quantized_cost,
    refuses_scheme,
    row_builds,
    row_config,
    scheme,
    store_quantized,
)
from .rms_norm import inverse_rms, refuses_norm, rms_norm, weighted
from .tape import call


@contract()
def rms_norm_quant(
    x_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype, group: int = 0, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return quantize(rms_norm(x, weight, eps), dtype, group, scale): q (T, D) and scales (T, ⌈D/group⌉) float32.

    The normed rows are rounded to x's dtype before they are quantized, so fused equals unfused. Moves T·D + D elements,
    T·D bytes and the scales. Raises ValueError as `quantize` does.
    """
    return quantize.meaning(rms_norm.meaning(x_TD, weight_D, eps), dtype, group, scale)


@rms_norm_quant.costs
def cost(
    x_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype, group: int = 0, scale: Tensor | None = None
) -> Cost:
    quantized = quantized_cost(x_TD, group)
    return Cost(bytes=quantized.bytes + weight_D.nbytes, flops=quantized.flops + 4 * x_TD.numel())


@rms_norm_quant.inputs(
    examples=(
        {"T": 1, "D": 16}, {"T": 3, "D": 33, "group": 16}, {"T": 0, "D": 8}, {"T": 2, "D": 40, "static": True},
        {"T": 5, "D": 576, "int8": True},
    ),
    shapes={
        "deepseek-v3 prefill": {"T": 4096, "D": 7168, "group": 128}, "llama-3-70b decode": {"T": 64, "D": 8192},
    },
    sizes={
        "T": (0, 6), "D": (1, 300), "group": [0, 16, 128], "int8": [False, True], "static": [False, True],
        "wide": [False, True],
    },
    rows=(0,),
)  # fmt: skip
def make(
    T: int, D: int, group: int = 0, int8: bool = False, static: bool = False, wide: bool = False, *,
    dtype: torch.dtype, device: str, seed: int,
) -> tuple[Tensor, Tensor, float, torch.dtype, int, Tensor | None]:  # fmt: skip
    """`wide` makes the weight float32, as Gemma's."""
    generator = torch.Generator(device).manual_seed(seed)
    x_TD = torch.randn(T, D, generator=generator, device=device).to(dtype)
    weight_D = 1 + 0.1 * torch.randn(D, generator=generator, device=device)
    return x_TD, weight_D if wide else weight_D.to(dtype), 1e-5, *scheme(group, int8, static, device)


@triton.jit
def _rms_norm_quant_kernel(
    x_ptr, weight_ptr, out_ptr, scale_ptr, static_ptr, x_stride, D, groups, eps, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, LIMIT: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    x = tl.load(x_ptr + row * x_stride + column, mask=column < D, other=0.0)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0)
    normed = weighted(x, inverse_rms(x, D, eps), weight).to(tl.float32)
    store_quantized(normed, out_ptr + row * D, scale_ptr + row * groups, static_ptr, D, GROUP, BLOCK, LIMIT, STATIC)


@rms_norm_quant.builds
def builds(dtype: str) -> Iterator[Build]:
    return row_builds(_rms_norm_quant_kernel, {"eps": "fp32"})


def _refuses(
    x_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype, group: int = 0, scale: Tensor | None = None
) -> str | None:
    return refuses_norm(x_TD, weight_D, eps) or refuses_scheme(dtype, group, scale)


@rms_norm_quant.provider("triton", devices=("cuda",), refuses=_refuses, triton=True)
def rms_norm_quant_triton(
    x_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype, group: int = 0, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    width = x_TD.shape[-1]
    out, scales = empty_quantized(x_TD, dtype, group)
    if rows := x_TD.numel() // width:
        _rms_norm_quant_kernel[(rows,)](
            x_TD, weight_D, out, scales, scale, x_TD.stride(-2), width, scales.shape[-1], eps,
            **row_config(width, dtype, group, scale is not None),
        )  # fmt: skip
    return out, scales


@rms_norm_quant.provider("composed", devices=("cpu",))
def rms_norm_quant_composed(
    x_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype, group: int = 0, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The norm by its own kernel, then quantize's meaning, which has none here."""
    return call(quantize.meaning, rms_norm.direct(x_TD, weight_D, eps), dtype, group, scale)
