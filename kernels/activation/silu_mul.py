"""The gated activation of SwiGLU MLPs, and the Triton kernel of all gated activations.

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, contract, rows_of
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton

GATED = {"x_TI2": "*T 2*I"}


@contract(args=GATED, flops=lambda x_TI2: 3 * x_TI2.numel())
def silu_mul(x_TI2: Tensor) -> Tensor:
    """Return silu(x[..., :I]) * x[..., I:] for x (T, 2·I): (T, I) in x's dtype, float32 or wider inside.

    Moves 3·T·I elements.
    """
    gate, up = x_TI2.to(torch.promote_types(x_TI2.dtype, torch.float32)).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(x_TI2.dtype)


@silu_mul.inputs(
    examples=({"T": 1, "I": 8}, {"T": 3, "I": 33}, {"T": 0, "I": 16}, {"T": 5, "I": 1536}),
    shapes={"llama-3-8b prefill": {"T": 4096, "I": 14336}, "llama-3-70b decode": {"T": 64, "I": 28672}},
    sizes={"T": (0, 9), "I": (1, 1100)},
    rows=(0,),
)
def make(draw: Draw, T: int, I: int) -> tuple[Any, ...]:
    return (draw(T, 2 * I),)


@triton.jit
def gated(gate, up, alpha, limit, KIND: tl.constexpr):
    """Return act(gate) * up of float32 tensors; selections instead of minimum and maximum let NaN through."""
    if KIND == "silu":
        return gate * tl.sigmoid(gate) * up
    elif KIND == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    elif KIND == "gelu_tanh":  # (1 + tanh u) / 2 = sigmoid(2 u)
        return gate * tl.sigmoid(1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)) * up
    else:
        tl.static_assert(KIND == "swiglu_clamped")
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        return gate * tl.sigmoid(alpha * gate) * (up + 1.0)


@triton.jit
def _gated_kernel(
    x_ptr, out_ptr, x_stride, I, alpha, limit, KIND: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < I
    gate_at = x_ptr + row * x_stride + (2 * column if INTERLEAVED else column)
    gate = tl.load(gate_at, mask=inside, other=0.0)
    up = tl.load(gate_at + (1 if INTERLEAVED else I), mask=inside, other=0.0).to(tl.float32)
    result = gated(gate.to(tl.float32), up, tl.cast(alpha, tl.float32), tl.cast(limit, tl.float32), KIND)
    tl.store(out_ptr + row * I + column, result.to(gate.dtype), mask=inside)


def config(I: int) -> dict[str, int]:
    """Launch configuration. Unmeasured: 1024 columns a program, 16-byte loads with 4 warps of bfloat16."""
    return {"BLOCK": min(triton.next_power_of_2(I), 1024), "num_warps": 4}


def gated_builds(kind: str, interleaved: bool = False) -> Iterator[Build]:
    for width in (256, 14336):
        constants = {"KIND": kind, "INTERLEAVED": interleaved, **config(width)}
        yield Build(_gated_kernel, constants, {"alpha": "fp32", "limit": "fp32"})


silu_mul.builds(gated_builds("silu"))


def launch_gated(x_TI2: Tensor, kind: str, alpha: float = 0.0, limit: float = 0.0, interleaved: bool = False) -> Tensor:
    """Launch the gated activation `kind` over (T, 2·I); `interleaved`: gate and up alternate instead of halves."""
    (rows, stride), width = rows_of(x_TI2), x_TI2.shape[-1] // 2
    out = torch.empty((*x_TI2.shape[:-1], width), dtype=x_TI2.dtype, device=x_TI2.device)
    if rows:
        chosen = config(width)
        _gated_kernel[(rows, triton.cdiv(width, chosen["BLOCK"]))](
            x_TI2, out, stride, width, alpha, limit, KIND=kind, INTERLEAVED=interleaved, **chosen
        )
    return out


silu_mul.provider("triton", devices=("cuda",), triton=True)(partial(launch_gated, kind="silu"))
