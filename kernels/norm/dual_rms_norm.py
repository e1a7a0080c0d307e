"""RMSNorm of two column ranges of one matrix, in one launch: the query's and the keys' latents of MLA.

Source: DeepSeek-AI 2024, https://arxiv.org/abs/2405.04434, section 2.1 and appendix; `rms_norm` for the norm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, Cost, contract, rows_of
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton

from .rms_norm import config, norm_row, norm_weight, rms_norm


def _limits(x_TN: Tensor, first_A: Tensor, second_B: Tensor) -> str | None:
    N, A, B = x_TN.shape[-1], first_A.shape[0], second_B.shape[0]
    return f"x has {N} columns, wanted at least the weights' {A} + {B}" if N < A + B else None


@contract(args={"x_TN": "*T N"}, limits=_limits)
def dual_rms_norm(x_TN: Tensor, first_A: Tensor, second_B: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return rms_norm of columns :A with weights first and of columns A:A+B with weights second: (T, A), (T, B).

    The weights' lengths are the split; x (T, N) may go on after A + B, as MLA's joint projection does:
    [1536 | 512 | 64] in DeepSeek-V3, whose last 64 turn by rope and are not normed. Moves 2·T·(A + B) + A + B elements.
    Raises ValueError when x has fewer columns.
    """
    A, B = first_A.shape[0], second_B.shape[0]
    return (
        rms_norm.meaning(x_TN[..., :A], first_A, eps), rms_norm.meaning(x_TN[..., A : A + B], second_B, eps)
    )  # fmt: skip


@dual_rms_norm.costs
def cost(x_TN: Tensor, first_A: Tensor, second_B: Tensor) -> Cost:
    columns = first_A.shape[0] + second_B.shape[0]
    normed = x_TN.numel() // x_TN.shape[-1] * columns
    return Cost(bytes=2 * normed * x_TN.element_size() + first_A.nbytes + second_B.nbytes, flops=4 * normed)


@dual_rms_norm.inputs(
    examples=(
        {"T": 1, "A": 8, "B": 8}, {"T": 3, "A": 33, "B": 20, "rest": 7}, {"T": 0, "A": 16, "B": 3},
        {"T": 5, "A": 1536, "B": 512, "rest": 64},
    ),
    shapes={
        "deepseek-v3 prefill": {"T": 4096, "A": 1536, "B": 512, "rest": 64},
        "deepseek-v3 decode": {"T": 64, "A": 1536, "B": 512, "rest": 64},
    },
    sizes={"T": (0, 9), "A": (1, 300), "B": (1, 300), "rest": (0, 9)},
    rows=(0,),
)  # fmt: skip
def make(draw: Draw, T: int, A: int, B: int, rest: int = 0) -> tuple[Any, ...]:
    return draw(T, A + B + rest), norm_weight(draw, A), norm_weight(draw, B), 1e-6


@triton.jit
def _dual_rms_norm_kernel(
    x_ptr, first_ptr, second_ptr, first_out_ptr, second_out_ptr, x_stride, A, B, eps, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        norm_row(x_ptr + row * x_stride, None, first_ptr, first_out_ptr + row * A, None, A, eps, BLOCK)
    else:
        norm_row(x_ptr + row * x_stride + A, None, second_ptr, second_out_ptr + row * B, None, B, eps, BLOCK)


dual_rms_norm.builds([Build(_dual_rms_norm_kernel, config(1536), {"eps": "fp32"})])


@dual_rms_norm.provider("triton", devices=("cuda",), triton=True)
def dual_rms_norm_triton(x_TN: Tensor, first_A: Tensor, second_B: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    A, B = first_A.shape[0], second_B.shape[0]
    first, second = (torch.empty((*x_TN.shape[:-1], n), dtype=x_TN.dtype, device=x_TN.device) for n in (A, B))
    rows, stride = rows_of(x_TN)
    if rows:
        _dual_rms_norm_kernel[(rows, 2)](x_TN, first_A, second_B, first, second, stride, A, B, eps, **config(max(A, B)))
    return first, second
