"""The gated activation of SwiGLU MLPs and experts, and quantization of its rows, in one pass over memory.

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202; `quantize` for the scheme.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import contract, rows_of
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton
from seamwise.kernels.quant.quantize import (
    SCHEME,
    empty_quantized,
    limits_scheme,
    quantize,
    refuses_group,
    row_builds,
    row_config,
    scheme,
    store_quantized,
)

from .silu_mul import GATED, gated, silu_mul


@contract(
    args={**GATED, **SCHEME, "row_T": "*T int32|int64!"}, limits=limits_scheme,
    flops=lambda x_TI2: 9 * x_TI2.numel() // 2,
)  # fmt: skip
def silu_mul_quant(
    x_TI2: Tensor, dtype: torch.dtype, group: int = 0, scale: Tensor | None = None, row_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return quantize(silu_mul(x), dtype, group, scale): q (T, I) and scales (T, ⌈I/group⌉) float32.

    The activation is rounded to x's dtype before it is quantized, so fused equals unfused. Rows t with row_T[t] < 0,
    the padding between experts, count as zeros whatever they hold; row_T is int32 or int64 (T,). Moves 2·T·I elements,
    T·I bytes and the scales. Raises ValueError as `quantize` does, and for a row_T that is not of integers.
    """
    activated_TI = silu_mul.meaning(x_TI2)
    if row_T is not None:
        activated_TI = activated_TI.masked_fill((row_T < 0).unsqueeze(-1), 0)
    return quantize.meaning(activated_TI, dtype, group, scale)


@silu_mul_quant.inputs(
    examples=(
        {"T": 1, "I": 16}, {"T": 3, "I": 33, "group": 16}, {"T": 0, "I": 8}, {"T": 2, "I": 40, "static": True},
        {"T": 5, "I": 576, "int8": True}, {"T": 6, "I": 2100, "group": 128, "padded": True},
    ),
    shapes={
        "deepseek-v3 experts prefill": {"T": 32768, "I": 2048, "group": 128, "padded": True},
        "llama-3-8b prefill": {"T": 4096, "I": 14336},
    },
    sizes={
        "T": (0, 6), "I": (1, 300), "group": [0, 16, 128], "int8": [False, True], "static": [False, True],
        "padded": [False, True],
    },
    rows=(0, 4),
)  # fmt: skip
def make(
    draw: Draw, T: int, I: int, group: int = 0, int8: bool = False, static: bool = False, padded: bool = False
) -> tuple[Any, ...]:
    """`padded`: about a third of the rows are padding, and hold NaN."""
    x_TI2 = draw(T, 2 * I)
    row_T = draw.integers(-1, 2, T, dtype=torch.int32) if padded else None
    if row_T is not None:
        x_TI2[row_T < 0] = torch.nan
    return x_TI2, *scheme(group, int8, static, draw.device), row_T


@triton.jit
def _silu_mul_quant_kernel(
    x_ptr, out_ptr, scale_ptr, static_ptr, row_ptr, x_stride, I, groups, PADDED: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, LIMIT: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    column = start + tl.arange(0, BLOCK)  # [BLOCK]
    end = I
    if PADDED:
        end = tl.where(tl.load(row_ptr + row) >= 0, I, 0)  # nothing of padding is read
    inside = column < end
    gate = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    up = tl.load(x_ptr + row * x_stride + I + column, mask=inside, other=0.0).to(tl.float32)
    activated = gated(gate.to(tl.float32), up, 0.0, 0.0, "silu").to(gate.dtype).to(tl.float32)
    out_at, scale_at = out_ptr + row * I + start, scale_ptr + row * groups + start // GROUP
    store_quantized(activated, out_at, scale_at, static_ptr, I - start, GROUP, BLOCK, LIMIT, STATIC)


def config(I: int, dtype: torch.dtype, group: int, static: bool) -> dict[str, object]:
    """Launch configuration. Unmeasured: groups are cut into programs of 1024 columns, else a row is a program."""
    return row_config(min(I, 1024) if group else I, dtype, group, static)


silu_mul_quant.builds(row_builds(_silu_mul_quant_kernel, {"row_ptr": "*i32"}, (1024, 14336), config, PADDED=True))


def _refuses(x_TI2: Tensor, group: int) -> str | None:
    if not group and x_TI2.shape[-1] > 2 * 16384:
        return f"{x_TI2.shape[-1] // 2} columns under one scale do not fit in registers, wanted groups or at most 16384"
    return None


@silu_mul_quant.provider("triton", devices=("cuda",), refuses=(_refuses, refuses_group), triton=True)
def silu_mul_quant_triton(
    x_TI2: Tensor, dtype: torch.dtype, group: int = 0, scale: Tensor | None = None, row_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    (rows, stride), width = rows_of(x_TI2), x_TI2.shape[-1] // 2
    out, scales = empty_quantized(x_TI2[..., :width], dtype, group)
    if rows:
        chosen = config(width, dtype, group, scale is not None)
        _silu_mul_quant_kernel[(rows, triton.cdiv(width, chosen["BLOCK"]))](
            x_TI2, out, scales, scale, row_T, stride, width, scales.shape[-1], PADDED=row_T is not None,
            **chosen,
        )  # fmt: skip
    return out, scales


def _padded(row_T: Any) -> str | None:
    return "rows of padding need the op as a whole" if row_T is not None else None


@silu_mul_quant.provider(
    "composed", devices=("cpu", "cuda"), refuses=_padded, strided=True, launches=True, composed=True
)
def silu_mul_quant_composed(
    x_TI2: Tensor, dtype: torch.dtype, group: int = 0, scale: Tensor | None = None, row_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The two ops by their own kernels."""
    return quantize(silu_mul.direct(x_TI2), dtype, group, scale)
