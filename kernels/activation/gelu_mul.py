"""The gated activation of GeGLU MLPs (Gemma): gelu of the first half of the columns times the second half.

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202; Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import contract
from seamwise.kernels.draw import Draw

from .silu_mul import GATED, gated_builds, launch_gated

_KINDS = {"tanh": "gelu_tanh", "none": "gelu"}


def _limits(approximate: str) -> str | None:
    return None if approximate in _KINDS else f"approximate is {approximate!r}, wanted 'tanh' or 'none'"


@contract(args=GATED, limits=_limits, flops=lambda x_TI2: 3 * x_TI2.numel())
def gelu_mul(x_TI2: Tensor, approximate: str = "tanh") -> Tensor:
    """Return gelu(x[..., :I]) * x[..., I:] for x (T, 2·I): (T, I) in x's dtype, float32 or wider inside.

    `approximate` is "tanh" or "none" (by erf), as in torch; anything else raises ValueError. Moves 3·T·I elements.
    """
    gate, up = x_TI2.to(torch.promote_types(x_TI2.dtype, torch.float32)).chunk(2, -1)
    return (torch.nn.functional.gelu(gate, approximate=approximate) * up).to(x_TI2.dtype)


@gelu_mul.inputs(
    examples=({"T": 1, "I": 8}, {"T": 3, "I": 33, "approximate": "none"}, {"T": 0, "I": 16}, {"T": 5, "I": 1536}),
    shapes={"gemma-3-4b prefill": {"T": 4096, "I": 10240}, "gemma-3-27b decode": {"T": 64, "I": 21504}},
    sizes={"T": (0, 9), "I": (1, 1100), "approximate": ["tanh", "none"]},
    rows=(0,),
)
def make(draw: Draw, T: int, I: int, approximate: str = "tanh") -> tuple[Any, ...]:
    return draw(T, 2 * I), approximate


gelu_mul.builds(build for kind in _KINDS.values() for build in gated_builds(kind))


@gelu_mul.provider("triton", devices=("cuda",), triton=True)
def gelu_mul_triton(x_TI2: Tensor, approximate: str = "tanh") -> Tensor:
    return launch_gated(x_TI2, _KINDS[approximate])
