"""Symmetric quantization of activations to float8 or int8, one scale for each group of columns, row or tensor.

Source: float8 e4m3: Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433; groups of 128 columns: DeepSeek-V3,
https://arxiv.org/abs/2412.19437, section 3.3.2; int8 rows: Dettmers et al. 2022, https://arxiv.org/abs/2208.07339.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, contract, rows_of
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton

LIMITS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
TRITON_TYPES = {torch.float8_e4m3fn: "*fp8e4nv", torch.int8: "*i8"}
_LEAST = 1e-10  # the least magnitude a scale stands for: rows of zeros have a scale too


def quantize_rows(
    wide_TD: Tensor, dtype: torch.dtype, group: int, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (q, scale) of float32 or wider rows as `quantize` defines them; fused ops end in it."""
    width, limit = wide_TD.shape[-1], LIMITS[dtype]
    group = group or width
    groups = -(-width // group)
    padding = groups * group - width
    padded = torch.nn.functional.pad(wide_TD, (0, padding)) if padding else wide_TD  # no pad: no copy
    grouped = padded.unflatten(-1, (groups, group))
    largest = grouped.abs().amax(-1)
    scale_TG = largest.clamp(min=_LEAST) / limit
    if scale is not None:
        scale_TG = torch.where(largest.isnan() & (dtype == torch.int8), scale_TG, scale)
    ratio = (grouped / scale_TG.unsqueeze(-1)).flatten(-2)[..., :width]
    rounded = ratio if dtype.is_floating_point else ratio.round()
    return rounded.clamp(-limit, limit).to(dtype), scale_TG.float()


SCHEME = {"scale": "1 float32"}


def limits_scheme(dtype: torch.dtype, group: int, scale: Tensor | None) -> str | None:
    """Return what is wrong with the arguments that say how to quantize, or None."""
    if dtype not in LIMITS:
        return f"dtype {dtype} is not one of {', '.join(map(str, LIMITS))}"
    if group < 0 or (group and scale is not None):
        return f"group {group} must be positive, or 0 for whole rows or with a given scale"
    return None


@contract(args={"x_TD": "*T D", **SCHEME}, limits=limits_scheme, flops=lambda x_TD: 3 * x_TD.numel())
def quantize(x_TD: Tensor, dtype: torch.dtype, group: int = 0, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (q, scale) with x ≈ q · scale: q (T, D) float8_e4m3fn or int8, scale (T, ⌈D/group⌉) float32.

    A scale is max |x| over `group` columns (0: the row) / 448 for float8, / 127 for int8; q rounds to nearest, ties to
    even, and saturates. A given `scale`, (1,) float32, serves all (group must be 0) and is returned as (T, 1).
    NaN stays NaN: a group's scale is NaN where one of its columns is, a given one too for int8, which has no NaN.
    Moves T·D elements, T·D bytes and the scales. Raises ValueError for any other dtype or group.
    """
    return quantize_rows(x_TD.to(torch.promote_types(x_TD.dtype, torch.float32)), dtype, group, scale)


@quantize.inputs(
    examples=(
        {"T": 1, "D": 16}, {"T": 3, "D": 33, "group": 16}, {"T": 0, "D": 8}, {"T": 2, "D": 40, "static": True},
        {"T": 5, "D": 576, "int8": True},
    ),
    shapes={
        "deepseek-v3 prefill": {"T": 4096, "D": 7168, "group": 128}, "llama-3-8b prefill": {"T": 4096, "D": 4096},
    },
    sizes={"T": (0, 6), "D": (1, 300), "group": [0, 16, 128], "int8": [False, True], "static": [False, True]},
    rows=(0,),
)  # fmt: skip
def make(draw: Draw, T: int, D: int, group: int = 0, int8: bool = False, static: bool = False) -> tuple[Any, ...]:
    return draw(T, D), *scheme(group, int8, static, draw.device)


def scheme(group: int, int8: bool, static: bool, device: str) -> tuple[torch.dtype, int, Tensor | None]:
    """Return the quantizing arguments (dtype, group, scale) of a test's choice."""
    chosen = torch.int8 if int8 else torch.float8_e4m3fn
    return chosen, 0 if static else group, torch.full((1,), 2 / LIMITS[chosen], device=device) if static else None


@triton.jit
def largest_magnitude(x):
    """Return max |x| of float32 over axis 1, 1e-10 at least; NaN where any is, which as an integer is the largest."""
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    return tl.maximum(bits.to(tl.float32, bitcast=True), 1e-10, tl.PropagateNan.ALL)


@triton.jit
def store_quantized(
    wide, out_ptr, scale_ptr, static_ptr, D, GROUP: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr,
    STATIC: tl.constexpr,
):  # fmt: skip
    """Quantize one row, float32 [BLOCK] with zeros beyond D, in groups; write it at out_ptr and scales at scale_ptr."""
    grouped = tl.reshape(wide, [BLOCK // GROUP, GROUP])
    scale = tl.math.div_rn(largest_magnitude(grouped), LIMIT)
    if STATIC:
        scale = tl.where((scale != scale) & (LIMIT == 127.0), scale, tl.load(static_ptr))  # int8 itself has no NaN
    ratio = tl.math.div_rn(grouped, tl.broadcast_to(scale[:, None], [BLOCK // GROUP, GROUP]))
    ratio = tl.clamp(ratio, -LIMIT, LIMIT, tl.PropagateNan.ALL)
    if LIMIT == 127.0:
        ratio = (ratio + 12582912.0) - 12582912.0  # 1.5 · 2^23: rounds to the nearest even integer
    group = tl.arange(0, BLOCK // GROUP)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    tl.store(out_ptr + column, ratio.to(out_ptr.dtype.element_ty), mask=column < D)
    tl.store(scale_ptr + group, scale, mask=group * GROUP < D)


@triton.jit
def _quantize_kernel(
    x_ptr, out_ptr, scale_ptr, static_ptr, x_stride, D, groups, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    LIMIT: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    wide = tl.load(x_ptr + row * x_stride + column, mask=column < D, other=0.0).to(tl.float32)
    store_quantized(wide, out_ptr + row * D, scale_ptr + row * groups, static_ptr, D, GROUP, BLOCK, LIMIT, STATIC)


def row_config(D: int, dtype: torch.dtype, group: int, static: bool) -> dict[str, object]:
    """Launch configuration of a kernel that ends in `store_quantized`. Unmeasured: a row is a program."""
    block = triton.next_power_of_2(max(D, group))
    return {
        "BLOCK": block, "GROUP": group or block, "LIMIT": LIMITS[dtype], "STATIC": static,
        "num_warps": min(max(block // 512, 1), 16),
    }  # fmt: skip


def row_builds(
    kernel: object, types: dict[str, str], widths: tuple[int, ...] = (576, 7168, 16384), config: Any = row_config,
    **constants: object,
) -> Iterator[Build]:  # fmt: skip
    """Yield a row kernel's builds, for every width and scheme; `types` are those of its other arguments."""
    for dtype, pointer in TRITON_TYPES.items():
        for group, static in ((0, False), (128, False), (0, True)):
            known = {"out_ptr": pointer, "scale_ptr": "*fp32", "static_ptr": "*fp32", **types}
            for width in widths:
                yield Build(kernel, {**config(width, dtype, group, static), **constants}, known)


def refuses_group(group: int) -> str | None:
    """Return why `store_quantized` cannot serve groups of so many columns, or None."""
    return f"group must be a power of two, got {group}" if group & (group - 1) else None


def empty_quantized(x_TD: Tensor, dtype: torch.dtype, group: int) -> tuple[Tensor, Tensor]:
    """Allocate the results (q, scale) of quantizing x."""
    width = x_TD.shape[-1]
    scale_shape = (*x_TD.shape[:-1], -(-width // (group or width)))
    return (
        torch.empty(x_TD.shape, dtype=dtype, device=x_TD.device),
        torch.empty(scale_shape, dtype=torch.float32, device=x_TD.device),
    )


quantize.builds(row_builds(_quantize_kernel, {}))


@quantize.provider("triton", devices=("cuda",), refuses=refuses_group, triton=True)
def quantize_triton(
    x_TD: Tensor, dtype: torch.dtype, group: int = 0, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    (rows, stride), width = rows_of(x_TD), x_TD.shape[-1]
    out, scales = empty_quantized(x_TD, dtype, group)
    if rows:
        _quantize_kernel[(rows,)](
            x_TD, out, scales, scale, stride, width, scales.shape[-1],
            **row_config(width, dtype, group, scale is not None),
        )  # fmt: skip
    return out, scales
