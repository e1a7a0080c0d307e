"""The clamped gated activation of gpt-oss's experts.

Source: OpenAI 2025, https://arxiv.org/abs/2508.10925, section 2; https://github.com/openai/gpt-oss, torch/model.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import contract
from seamwise.kernels.draw import Draw

from .silu_mul import GATED, gated_builds, launch_gated


@contract(args=GATED, flops=lambda x_TI2: 3 * x_TI2.numel())
def swiglu_clamped(x_TI2: Tensor, alpha: float = 1.702, limit: float = 7.0, interleaved: bool = False) -> Tensor:
    """Return (u + 1) · g · sigmoid(alpha · g), g = min(gate, limit), u = up clamped to ±limit: (T, I) in x's dtype.

    x (T, 2·I) holds gate and up as halves; `interleaved`: alternating, gate first, as gpt-oss's checkpoints have them.
    float32 or wider inside. Moves 3·T·I elements.
    """
    wide = x_TI2.to(torch.promote_types(x_TI2.dtype, torch.float32))
    gate, up = wide.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else wide.chunk(2, -1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ((up + 1) * gate * torch.sigmoid(alpha * gate)).to(x_TI2.dtype)


@swiglu_clamped.inputs(
    examples=(
        {"T": 1, "I": 8}, {"T": 3, "I": 33, "interleaved": True}, {"T": 0, "I": 16}, {"T": 5, "I": 1536, "limit": 0.5},
    ),
    shapes={"gpt-oss-120b prefill": {"T": 16384, "I": 2880, "interleaved": True}},
    sizes={"T": (0, 9), "I": (1, 1100), "limit": [0.5, 7.0], "interleaved": [False, True]},
    rows=(0,),
)  # fmt: skip
def make(draw: Draw, T: int, I: int, limit: float = 7.0, interleaved: bool = False) -> tuple[Any, ...]:
    return draw(T, 2 * I), 1.702, limit, interleaved


swiglu_clamped.builds(build for interleaved in (False, True) for build in gated_builds("swiglu_clamped", interleaved))


@swiglu_clamped.provider("triton", devices=("cuda",), triton=True)
def swiglu_clamped_triton(x_TI2: Tensor, alpha: float = 1.702, limit: float = 7.0, interleaved: bool = False) -> Tensor:
    return launch_gated(x_TI2, "swiglu_clamped", alpha, limit, interleaved)
