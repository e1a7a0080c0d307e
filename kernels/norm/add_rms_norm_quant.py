"""Residual addition, RMSNorm of the sum, and quantization of the normed rows, in one pass over memory.

Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467; `quantize` for the scheme.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.quant.quantize import SCHEME, limits_scheme, quantize, refuses_group

from .add_rms_norm import add_rms_norm
from .rms_norm_quant import launch_norm_quant, norm_quant_builds, rms_norm_quant


@contract(
    args={"x_TD": "*T D", "residual_TD": "*T D", **SCHEME}, limits=limits_scheme, flops=lambda x_TD: 8 * x_TD.numel()
)
def add_rms_norm_quant(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype, group: int = 0,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (*quantize(rms_norm(s, weight, eps), dtype, group, scale), s) with s = x + residual in x's dtype.

    q is (T, D), the scales (T, ⌈D/group⌉) float32; every step rounds as the unfused ops do. Moves 3·T·D + D elements,
    T·D bytes and the scales. Raises ValueError as `quantize` does.
    """
    normed_TD, total_TD = add_rms_norm.meaning(x_TD, residual_TD, weight_D, eps)
    return *quantize.meaning(normed_TD, dtype, group, scale), total_TD


@add_rms_norm_quant.inputs(
    examples=rms_norm_quant.examples, shapes=rms_norm_quant.shapes, sizes=rms_norm_quant.sizes, rows=(0, 1)
)
def make(draw: Draw, T: int, D: int, **more: Any) -> tuple[Any, ...]:
    x_TD, *rest = rms_norm_quant.drawn(draw, T=T, D=D, **more)
    return x_TD, draw(T, D), *rest


add_rms_norm_quant.builds(norm_quant_builds())


add_rms_norm_quant.provider("triton", devices=("cuda",), refuses=refuses_group, triton=True)(launch_norm_quant)


@add_rms_norm_quant.provider("composed", devices=("cpu", "cuda"), strided=True, launches=True, composed=True)
def add_rms_norm_quant_composed(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, *scheme: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The two ops by their own kernels."""
    normed_TD, total_TD = add_rms_norm.direct(x_TD, residual_TD, weight_D, eps)
    return *quantize(normed_TD, *scheme), total_TD
