"""The gated activation of GeGLU MLPs (Gemma): gelu of the first half of the columns times the second half.

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202; Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .contract import Build, Cost, contract
from .silu_mul import gated_builds, gated_cost, launch_gated, refuses_gated

_KINDS = {"tanh": "gelu_tanh", "none": "gelu"}


@contract()
def gelu_mul(x_TI2: Tensor, approximate: str = "tanh") -> Tensor:
    """Return gelu(x[..., :I]) * x[..., I:] for x (T, 2·I): (T, I) in x's dtype, float32 or wider inside.

    `approximate` is "tanh" or "none" (by erf), as in torch; anything else raises ValueError. Moves 3·T·I elements.
    """
    if approximate not in _KINDS:
        raise ValueError(f"gelu_mul: approximate is {approximate!r}, wanted 'tanh' or 'none'")
    gate, up = x_TI2.to(torch.promote_types(x_TI2.dtype, torch.float32)).chunk(2, -1)
    return (torch.nn.functional.gelu(gate, approximate=approximate) * up).to(x_TI2.dtype)


@gelu_mul.costs
def cost(x_TI2: Tensor, approximate: str = "tanh") -> Cost:
    return gated_cost(x_TI2)


@gelu_mul.inputs(
    examples=({"T": 1, "I": 8}, {"T": 3, "I": 33, "approximate": "none"}, {"T": 0, "I": 16}, {"T": 5, "I": 1536}),
    shapes={"gemma-3-4b prefill": {"T": 4096, "I": 10240}, "gemma-3-27b decode": {"T": 64, "I": 21504}},
    sizes={"T": (0, 9), "I": (1, 1100), "approximate": ["tanh", "none"]},
    rows=(0,),
)
def make(
    T: int, I: int, approximate: str = "tanh", *, dtype: torch.dtype, device: str, seed: int
) -> tuple[Tensor, str]:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(T, 2 * I, generator=generator, device=device).to(dtype), approximate


@gelu_mul.builds
def builds(dtype: str) -> Iterator[Build]:
    for kind in _KINDS.values():
        yield from gated_builds(kind)


def _refuses(x_TI2: Tensor, approximate: str = "tanh") -> str | None:
    if approximate not in _KINDS:
        return f"approximate is {approximate!r}, wanted 'tanh' or 'none'"
    return refuses_gated(x_TI2)


@gelu_mul.provider("triton", devices=("cuda",), refuses=_refuses, triton=True)
def gelu_mul_triton(x_TI2: Tensor, approximate: str = "tanh") -> Tensor:
    return launch_gated(x_TI2, _KINDS[approximate])
