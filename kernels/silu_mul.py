"""The gated activation of SwiGLU MLPs: silu of the first half of the columns times the second half.

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import Build, Cost, contract


@contract()
def silu_mul(x_TI2: Tensor) -> Tensor:
    """Return silu(x[..., :I]) * x[..., I:] for x (T, 2·I): (T, I) in x's dtype, float32 or wider inside.

    Moves 3·T·I elements.
    """
    gate, up = x_TI2.to(torch.promote_types(x_TI2.dtype, torch.float32)).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(x_TI2.dtype)


@silu_mul.costs
def cost(x_TI2: Tensor) -> Cost:
    return Cost(bytes=x_TI2.nbytes * 3 // 2, flops=3 * x_TI2.numel())


@silu_mul.inputs(
    examples=({"T": 1, "I": 8}, {"T": 3, "I": 33}, {"T": 0, "I": 16}, {"T": 5, "I": 1536}),
    shapes={"llama-3-8b prefill": {"T": 4096, "I": 14336}, "llama-3-70b decode": {"T": 64, "I": 28672}},
    sizes={"T": (0, 9), "I": (1, 1100)},
    rows=(0,),
)
def make(T: int, I: int, *, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(T, 2 * I, generator=generator, device=device).to(dtype),)


@triton.jit
def _silu_mul_kernel(x_ptr, out_ptr, x_stride, I, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < I
    gate = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    up = tl.load(x_ptr + row * x_stride + I + column, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    tl.store(out_ptr + row * I + column, (wide * tl.sigmoid(wide) * up).to(gate.dtype), mask=inside)


def config(I: int) -> dict[str, int]:
    """Launch configuration. Unmeasured: 1024 columns a program, 16-byte loads with 4 warps of bfloat16."""
    return {"BLOCK": min(triton.next_power_of_2(I), 1024), "num_warps": 4}


@silu_mul.builds
def builds(dtype: str) -> Iterator[Build]:
    for width in (256, 14336):
        yield Build(_silu_mul_kernel, config(width))


def _refuses(x_TI2: Tensor) -> str | None:
    if x_TI2.shape[-1] % 2:
        return f"x has {x_TI2.shape[-1]} columns, wanted an even number: gate and up"
    if x_TI2.stride(-1) != 1 or (x_TI2.dim() != 2 and not x_TI2.is_contiguous()):
        return f"x must be rows contiguous in its last dimension, its strides are {x_TI2.stride()}"
    return None


@silu_mul.provider("triton", devices=("cuda",), refuses=_refuses, triton=True)
def silu_mul_triton(x_TI2: Tensor) -> Tensor:
    width = x_TI2.shape[-1] // 2
    out = torch.empty((*x_TI2.shape[:-1], width), dtype=x_TI2.dtype, device=x_TI2.device)
    if rows := x_TI2.numel() // (2 * width):
        chosen = config(width)
        grid = (rows, triton.cdiv(width, chosen["BLOCK"]))
        _silu_mul_kernel[grid](x_TI2, out, x_TI2.stride(-2), width, **chosen)
    return out
