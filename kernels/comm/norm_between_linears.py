"""What stands between two matrices that ranks share out: GEMM, sum over the ranks, norm of shares, GEMM; overlapped.

The rows go in chunks: while one chunk's sum, or its normed rows, travel, another chunk's GEMM runs. Where ranks share
memory, torch's own GEMMs do so (provider "symmetric"), which the tests here run by torch's fallbacks, without a GPU.
Source: Wang et al. 2022, https://doi.org/10.1145/3567955.3567959; asynchronous tensor parallelism in torch,
https://discuss.pytorch.org/t/distributed-w-torchtitan-introducing-async-tensor-parallelism-in-pytorch/209487.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from seamwise.kernels.contract import Cost, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.norm.add_rms_norm import add_rms_norm
from seamwise.kernels.norm.rms_norm import rms_norm

from .allreduce_rms_norm import normed_sum
from .collectives import group_size, shared_memory
from .reduce_scatter_rms_norm import limits_share, reduce_scatter_rms_norm

CHUNK_ROWS, MAX_CHUNKS = 1024, 4  # unmeasured: fewer rows fill no GPU's GEMM, and each chunk is a launch of everything
_OPS = torch.ops._c10d_functional


def _empty(x_TK: Tensor, down_DK: Tensor, up_ND: Tensor, group_name: str) -> tuple[Tensor, Tensor]:
    rows, share = x_TK.shape[0], -(-x_TK.shape[0] // group_size(group_name))
    return x_TK.new_empty((rows, up_ND.shape[0])), x_TK.new_empty((share, down_DK.shape[0]))


@contract(
    limits=lambda x_TK, residual_SD, group_name: limits_share(x_TK, residual_SD, group_name), opaque=True, fake=_empty,
    reads_values=True,
)  # fmt: skip
def norm_between_linears(
    x_TK: Tensor, down_DK: Tensor, residual_SD: Tensor | None, weight_D: Tensor, eps: float, group_name: str,
    up_ND: Tensor, bias_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (linear(normed, up, bias), s): (T, N), and this rank's share (S, D) of the residual, in x's dtype.

    normed, s = reduce_scatter_rms_norm(linear(x, down), residual, weight, eps, group, gather=True); down and up are
    this rank's parts. Moves T·(K + N) elements, the matrices, and 2·T·D elements between ranks.
    """
    summand_TD = linear(x_TK, down_DK)
    normed_TD, total_SD = reduce_scatter_rms_norm.meaning(summand_TD, residual_SD, weight_D, eps, group_name, True)
    return linear(normed_TD, up_ND, bias_N), total_SD


@norm_between_linears.costs
def cost(
    x_TK: Tensor, down_DK: Tensor, residual_SD: Tensor | None, weight_D: Tensor, eps: float, group_name: str,
    up_ND: Tensor,
) -> Cost:  # fmt: skip
    rows, element, matrices = x_TK.shape[0], x_TK.element_size(), down_DK.numel() + up_ND.numel()
    inner = reduce_scatter_rms_norm.cost(x_TK.new_empty(rows, down_DK.shape[0]), residual_SD, weight_D, eps, group_name)
    moved = x_TK.nbytes + (matrices + rows * up_ND.shape[0]) * element
    return Cost(bytes=moved + inner.bytes, flops=2 * rows * matrices + inner.flops)


@norm_between_linears.inputs(
    examples=({"T": 1, "K": 8, "D": 16, "N": 8}, {"T": 3, "K": 5, "D": 33, "N": 7, "bias": True}),
    shapes={"llama-3-70b prefill, 8 ranks": {"T": 4096, "K": 3584, "D": 8192, "N": 1280}},
    sizes={"T": (0, 9), "K": (1, 40), "D": (1, 80), "N": (1, 40), "bias": [False, True], "residual": [False, True]},
)
def make(draw: Draw, T: int, K: int, D: int, N: int, bias: bool = False, residual: bool = True) -> tuple[Any, ...]:
    """One rank's inputs."""
    _, *norm, _ = reduce_scatter_rms_norm.drawn(draw, T=T, D=D, residual=residual)
    x_TK, down_DK, up_ND = ((draw.normal(*s) * s[1] ** -0.5).to(draw.dtype) for s in ((T, K), (D, K), (N, D)))
    return x_TK, down_DK, *norm, up_ND, draw(N) if bias else None


@norm_between_linears.provider("symmetric", devices=("cuda",), strided=True)
def norm_between_linears_symmetric(
    x_TK: Tensor, down_DK: Tensor, residual_SD: Tensor | None, weight_D: Tensor, eps: float, group_name: str,
    up_ND: Tensor, bias_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """torch's GEMMs that exchange each rank's rows while others are multiplied, where their workspace is reserved."""
    rows, shared = x_TK.shape[0], shared_memory(group_name)
    padded = pad(x_TK, (0, 0, 0, -rows % group_size(group_name)))
    if not rows or shared is None or padded.shape[0] * down_DK.shape[0] * x_TK.itemsize > shared.workspace_bytes:
        return norm_between_linears_chunked(x_TK, down_DK, residual_SD, weight_D, eps, group_name, up_ND, bias_N)
    total_SD = torch.ops.symm_mem.fused_matmul_reduce_scatter(padded, down_DK.t(), "sum", 0, group_name)
    normed_SD, total_SD = normed_sum(total_SD, residual_SD, weight_D, eps, rms_norm, add_rms_norm)
    _, (made,) = torch.ops.symm_mem.fused_all_gather_matmul(normed_SD, [up_ND.t()], 0, group_name, return_A=False)
    return (made if bias_N is None else made + bias_N)[:rows], total_SD


@norm_between_linears.provider("chunked", strided=True)
def norm_between_linears_chunked(
    x_TK: Tensor, down_DK: Tensor, residual_SD: Tensor | None, weight_D: Tensor, eps: float, group_name: str,
    up_ND: Tensor, bias_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, ranks = x_TK.shape[0], group_size(group_name)
    if not group_name or not rows:
        return norm_between_linears.meaning(x_TK, down_DK, residual_SD, weight_D, eps, group_name, up_ND, bias_N)
    share = -(-rows // ranks)
    x_RSK = pad(x_TK, (0, 0, 0, ranks * share - rows)).unflatten(0, (ranks, share))
    cut = -(-share // max(1, min(MAX_CHUNKS, rows // CHUNK_ROWS)))
    sums, gathered, totals = [], [], []
    for x_RCK in x_RSK.split(cut, 1):  # a chunk has rows of every rank's share: shares are those of the unchunked op
        summand = linear(x_RCK.flatten(0, 1), down_DK)
        sums.append(_OPS.reduce_scatter_tensor(summand, "sum", ranks, group_name))
    residuals = [None] * len(sums) if residual_SD is None else residual_SD.split(cut)
    for begun, residual_CD in zip(sums, residuals, strict=True):
        normed_CD, total_CD = normed_sum(_OPS.wait_tensor(begun), residual_CD, weight_D, eps, rms_norm, add_rms_norm)
        gathered.append(_OPS.all_gather_into_tensor(normed_CD, ranks, group_name))
        totals.append(total_CD)
    made = [linear(_OPS.wait_tensor(g), up_ND, bias_N).unflatten(0, (ranks, -1)) for g in gathered]
    return torch.cat(made, 1).flatten(0, 1)[:rows], torch.cat(totals)
