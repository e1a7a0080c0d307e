"""What the Triton GEMMs over quantized weights share: tile sizes, the order of programs, the end of a tile.

Source: grouped order of programs: Triton's matrix multiplication tutorial,
https://triton-lang.org/main/getting-started/tutorials/03-matrix-multiplication.html.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from seamwise.kernels.lazy_triton import tl, triton


def config(T: int, N: int, itemsize: int) -> dict[str, int]:
    """Return tile sizes by rows T, columns N and bytes of an element of x; a program is one tile of the result.

    Unmeasured: narrow tiles for decode, so that N = 4096 gives each of 132 multiprocessors one, without split-K. The
    depth of a step is the kernel's own and the same for every T, so that a row's sums keep their order; whether mma
    (16 rows) and wgmma (64 and more) then give the same bits is unmeasured.
    """
    if itemsize == 4:  # float32 multiplies without tensor cores, in registers
        sizes = (16, 32, 4, 2) if T <= 16 else (32, 32, 4, 2)
    elif T <= 16:
        sizes = (16, 32 if N < 16384 else 64, 4, 4)
    elif T <= 64:
        sizes = (64, 64, 4, 4)
    else:
        sizes = (64, 128, 8, 3) if T <= 256 else (128, 128, 8, 3)
    rows, columns, warps, stages = sizes
    return {"BLOCK_T": rows, "BLOCK_N": columns, "BAND": 8, "num_warps": warps, "num_stages": stages}


def configs(itemsize: int) -> Iterator[dict[str, int]]:
    """Yield every configuration that `config` can return."""
    for T, N in ((16, 4096), (16, 16384), (64, 4096), (256, 4096), (4096, 4096)):
        if itemsize != 4 or (T, N) in ((16, 4096), (64, 4096)):
            yield config(T, N, itemsize)


def grid(T: int, N: int, chosen: dict[str, int]) -> tuple[int]:
    """Return how many programs cover (T, N)."""
    return (triton.cdiv(T, chosen["BLOCK_T"]) * triton.cdiv(N, chosen["BLOCK_N"]),)


def refuses_wide(x_TK: Tensor) -> str | None:
    """Return why the kernels cannot multiply x, or None."""
    return "x is float64, wanted float16, bfloat16 or float32" if x_TK.dtype == torch.float64 else None


@triton.jit
def program_tile(T, N, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr):
    """Return (row tile, column tile) of this program: BAND row tiles share each column tile while it is in L2."""
    rows, columns = tl.cdiv(T, BLOCK_T), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    return tl.swizzle2d(program // columns, program % columns, rows, columns, BAND)


@triton.jit
def load_tile(x_ptr, x_at, x_in, w_ptr, w_at, w_in, k, K):
    """Load x [BLOCK_T, BLOCK_K] and w [BLOCK_K, BLOCK_N] at columns k, from rows at the int64 offsets x_at and w_at."""
    inside = k < K
    x = tl.load(x_ptr + x_at[:, None] + k[None, :], mask=x_in[:, None] & inside[None, :], other=0.0)
    w = tl.load(w_ptr + w_at[None, :] + k[:, None], mask=w_in[None, :] & inside[:, None], other=0.0)
    return x, w


@triton.jit
def store_tile(sums, out_ptr, bias_ptr, row, column, T, N, BIAS: tl.constexpr):
    """Add the bias to float32 sums [BLOCK_T, BLOCK_N] and write them to out (T, N) in its dtype."""
    if BIAS:
        sums += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(out_ptr + at, sums.to(out_ptr.dtype.element_ty), mask=(row < T)[:, None] & (column < N)[None, :])
