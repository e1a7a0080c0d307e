"""Residual addition and RMSNorm of the sum, in one pass over memory.

Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467; the pre-norm residual block of Llama.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from seamwise.kernels.contract import contract
from seamwise.kernels.draw import Draw

from .rms_norm import launch_norm, norm_builds, norm_weight, rms_norm


@contract(args={"x_TD": "*T D", "residual_TD": "*T D"}, flops=lambda x_TD: 5 * x_TD.numel())
def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(s), s) with s = x + residual: both (T, D) in x's dtype.

    The sum is rounded to x's dtype before it is normalized, and the weight multiplies, as in the unfused ops.
    Moves 4·T·D + D elements.
    """
    total_TD = x_TD + residual_TD
    return rms_norm.meaning(total_TD, weight_D, eps), total_TD


@add_rms_norm.inputs(examples=rms_norm.examples, shapes=rms_norm.shapes, sizes=rms_norm.sizes, rows=(0, 1))
def make(draw: Draw, T: int, D: int, wide: bool = False) -> tuple[Any, ...]:
    return draw(T, D), draw(T, D), norm_weight(draw, D, wide), 1e-5


add_rms_norm.builds(norm_builds({}))


add_rms_norm.provider("triton", devices=("cuda",), triton=True)(launch_norm)
