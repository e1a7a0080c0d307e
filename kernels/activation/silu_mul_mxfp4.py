"""The gated activation of SwiGLU experts, and MXFP4 quantization of its rows, in one pass over memory.

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202; `quantize_mxfp4` for the format.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from seamwise.kernels.contract import contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.quant.quantize_mxfp4 import launch_mxfp4, mxfp4_build, quantize_mxfp4, refuses_wide

from .silu_mul import silu_mul


@contract(args={"x_TI2": "*T 64*G"}, flops=lambda x_TI2: 9 * x_TI2.numel() // 2)
def silu_mul_mxfp4(x_TI2: Tensor) -> tuple[Tensor, Tensor]:
    """Return quantize_mxfp4(silu_mul(x)) of x (T, 2·I): codes (T, I/2) and scales (T, I/32), I a multiple of 32.

    The activation is rounded to x's dtype before it is quantized, so fused equals unfused. Moves 2·T·I elements and
    T·I/2 + T·I/32 bytes. Raises ValueError for another I.
    """
    return quantize_mxfp4.meaning(silu_mul.meaning(x_TI2))


@silu_mul_mxfp4.inputs(
    examples=({"T": 1, "I": 32}, {"T": 3, "I": 96}, {"T": 0, "I": 64}, {"T": 2, "I": 2080}),
    shapes={
        "gpt-oss-120b prefill": {"T": 16384, "I": 2880}, "deepseek-v3 experts decode": {"T": 512, "I": 2048},
    },
    sizes={"T": (0, 6), "I": [32, 160, 1056]},
    rows=(0,),
    fp4=(0,),
)  # fmt: skip
def make(draw: Draw, T: int, I: int) -> tuple[Any, ...]:
    return silu_mul.drawn(draw, T=T, I=I)


silu_mul_mxfp4.builds([mxfp4_build(2880, gated=True)])


@silu_mul_mxfp4.provider("triton", devices=("cuda",), refuses=lambda x_TI2: refuses_wide(x_TI2), triton=True)
def silu_mul_mxfp4_triton(x_TI2: Tensor) -> tuple[Tensor, Tensor]:
    return launch_mxfp4(x_TI2, x_TI2.shape[-1] // 2, gated=True)
