"""Sum over the ranks of a group, residual addition and RMSNorm: what follows a row-parallel GEMM.

Small sums are read from all ranks' memory by the kernel that norms them (one shot); larger ones are summed in shares
first (two shots), and what exceeds the shared memory goes through the plain collective. Source: Shoeybi et al. 2019,
https://arxiv.org/abs/1909.08053, section 3; thresholds: vLLM, https://github.com/vllm-project/vllm,
csrc/custom_all_reduce.cuh.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton
from seamwise.kernels.norm.add_rms_norm import add_rms_norm
from seamwise.kernels.norm.rms_norm import config, inverse_rms, norm_weight, rms_norm, weighted

from .collectives import all_reduce, group_size, published, shared_memory


@contract(flops=lambda x_TD, residual_TD: (4 if residual_TD is None else 5) * x_TD.numel())
def allreduce_rms_norm(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float, group_name: str
) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(s), s) with s = the ranks' sum of x, + residual where given: both (T, D) in x's dtype.

    Every rank has the same residual and gets the same results. The group "" is this rank alone. The sum and s are
    rounded to x's dtype. Moves at least 2·T·D elements between ranks, and 4·T·D here.
    """
    return normed_sum(all_reduce(x_TD, group_name), residual_TD, weight_D, eps)


def normed_sum(
    sum_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float,
    norm: Callable[..., Tensor] = rms_norm.meaning,
    add_norm: Callable[..., tuple[Tensor, Tensor]] = add_rms_norm.meaning,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (norm(s), s) with s = sum, + residual where given: in plain torch, unless the ops are given."""
    if residual_TD is not None:
        return add_norm(sum_TD, residual_TD, weight_D, eps)
    return norm(sum_TD, weight_D, eps), sum_TD


@allreduce_rms_norm.inputs(
    examples=(*rms_norm.examples, {"T": 3, "D": 33, "residual": False}),
    shapes={"llama-3-70b decode": {"T": 64, "D": 8192}, "llama-3-70b prefill": {"T": 4096, "D": 8192}},
    sizes={**rms_norm.sizes, "residual": [False, True]},
    rows=(0, 1),
)
def make(draw: Draw, T: int, D: int, residual: bool = True, wide: bool = False) -> tuple[Any, ...]:
    """One rank's inputs."""
    return draw(T, D), draw(T, D) if residual else None, norm_weight(draw, D, wide), 1e-5, ""


@triton.jit
def summed_row(peers_ptr, residual_ptr, total_ptr, at, D, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sum of the ranks' rows that begin at element `at`, + residual, in total's dtype; store it at total."""
    column = tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < D
    element = total_ptr.dtype.element_ty
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(RANKS):  # in the same order on every rank: their results are the same in bits
        peer = tl.multiple_of(tl.load(peers_ptr + rank).to(total_ptr.dtype), 16)
        total += tl.load(peer + at + column, mask=inside, other=0.0).to(tl.float32)
    total = total.to(element)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + column, mask=inside, other=0.0)
        total = (total.to(tl.float32) + residual.to(tl.float32)).to(element)
    tl.store(total_ptr + column, total, mask=inside)
    return total


@triton.jit
def _sum_norm_kernel(
    peers_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, residual_stride, first_row, D, eps,
    RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    residual_row = residual_ptr + row * residual_stride if residual_ptr is not None else None
    total = summed_row(peers_ptr, residual_row, total_ptr + row * D, (first_row + row) * D, D, RANKS, BLOCK)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0)
    normed = weighted(total, inverse_rms(total, D, eps), weight)
    tl.store(out_ptr + row * D + column, normed, mask=column < D)


BUILDS = [
    Build(_sum_norm_kernel, {**config(width), "RANKS": ranks}, {"peers_ptr": "*i64", "eps": "fp32"})
    for width in (4096, 16384) for ranks in (2, 8)
]  # fmt: skip
allreduce_rms_norm.builds(BUILDS)


def sum_norm(
    peers_R: Tensor, x_TD: Tensor, residual_SD: Tensor | None, weight_D: Tensor, eps: float, first_row: int, rows: int
) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(s), s), (rows, D), of the ranks' sum of `rows` rows of x from first_row, + residual.

    The ranks' copies of x, contiguous, lie at the addresses `peers`.
    """
    width = x_TD.shape[-1]
    normed, total = (torch.empty(rows, width, dtype=x_TD.dtype, device=x_TD.device) for _ in range(2))
    if rows:
        _sum_norm_kernel[(rows,)](
            peers_R, residual_SD, weight_D, normed, total, residual_SD.stride(0) if residual_SD is not None else 0,
            first_row, width, eps, RANKS=peers_R.shape[0], **config(width),
        )  # fmt: skip
    return normed, total


def one_shot(x_TD: Tensor, group_name: str) -> bool:
    """Return whether every rank reads all of x from every other, or sums come first. Unmeasured: vLLM's thresholds."""
    shared, ranks = shared_memory(group_name), group_size(group_name)
    few = ranks <= 2 or x_TD.nbytes <= (512 << 10 if ranks <= 4 else 256 << 10)
    return ranks == 1 or (few and shared is not None and shared.holds(x_TD))


def summed(x_TD: Tensor, group_name: str) -> Tensor:
    """Return the ranks' sum of x: in two shots where memory is shared and holds it, else by the plain collective.

    torch's kernel sums bfloat16 and float32, in whole 16 bytes.
    """
    shared, served = shared_memory(group_name), x_TD.dtype in (torch.bfloat16, torch.float32)
    if shared is None or not shared.holds(x_TD) or not served or x_TD.nbytes % 16:
        return all_reduce(x_TD, group_name)
    return torch.ops.symm_mem.two_shot_all_reduce_(shared.copy(x_TD), "sum", group_name).clone()


@allreduce_rms_norm.provider("triton", devices=("cuda",), triton=True)
def allreduce_rms_norm_triton(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float, group_name: str
) -> tuple[Tensor, Tensor]:
    if one_shot(x_TD, group_name):
        with published(x_TD, group_name) as peers_R:
            return sum_norm(peers_R, x_TD, residual_TD, weight_D, eps, 0, x_TD.shape[0])
    return allreduce_rms_norm_collective(x_TD, residual_TD, weight_D, eps, group_name)


@allreduce_rms_norm.provider("collective", strided=True)
def allreduce_rms_norm_collective(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float, group_name: str
) -> tuple[Tensor, Tensor]:
    return normed_sum(summed(x_TD, group_name), residual_TD, weight_D, eps, rms_norm, add_rms_norm)
