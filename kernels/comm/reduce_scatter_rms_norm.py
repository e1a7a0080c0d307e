"""Sum over the ranks with each keeping its share of the rows, residual addition and RMSNorm: sequence parallelism.

Source: Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 4.2.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.norm.add_rms_norm import add_rms_norm
from seamwise.kernels.norm.rms_norm import rms_norm
from seamwise.kernels.signature import cdiv

from .allreduce_rms_norm import BUILDS, allreduce_rms_norm, normed_sum, sum_norm
from .collectives import all_gather_rows, group_rank, group_size, published, reduce_scatter_rows, shared_memory


def _empty(x_TD: Tensor, group_name: str, gather: bool) -> tuple[Tensor, Tensor]:
    share_SD = x_TD.new_empty((-(-x_TD.shape[0] // group_size(group_name)), *x_TD.shape[1:]))
    return x_TD.new_empty(x_TD.shape) if gather else torch.empty_like(share_SD), share_SD


def limits_share(x: Tensor, residual_SD: Tensor | None, group_name: str) -> str | None:
    """Return why a residual is not this rank's share of the rows of x, or None."""
    if residual_SD is None:
        return None
    share, got = cdiv(x.shape[0], group_size(group_name)), residual_SD.shape[0]
    wrong = isinstance(got, int) and isinstance(share, int) and got != share
    return f"residual has {got} rows, wanted {share}: this rank's share of {x.shape[0]}" if wrong else None


@contract(
    limits=lambda x_TD, residual_SD, group_name: limits_share(x_TD, residual_SD, group_name), fake=_empty,
    reads_values=True, flops=lambda x_TD: 5 * x_TD.numel(),
)  # fmt: skip
def reduce_scatter_rms_norm(
    x_TD: Tensor, residual_SD: Tensor | None, weight_D: Tensor, eps: float, group_name: str, gather: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(s), s), s being this rank's S = ⌈T / ranks⌉ rows of the ranks' sum of x, + residual where given.

    Results are (S, D) in x's dtype; with `gather` the normed rows are those of all ranks, (T, D). The sum and s are
    rounded to x's dtype; where T does not divide, the last rows are padding. Moves at least T·D elements between ranks,
    and as many to gather.
    """
    normed_SD, total_SD = normed_sum(reduce_scatter_rows(x_TD, group_name), residual_SD, weight_D, eps)
    return _gathered(normed_SD, x_TD, group_name) if gather else normed_SD, total_SD


def _gathered(normed_SD: Tensor, x_TD: Tensor, group_name: str) -> Tensor:
    return all_gather_rows(normed_SD, group_name)[: x_TD.shape[0]]


@reduce_scatter_rms_norm.inputs(
    examples=allreduce_rms_norm.examples,
    shapes={"llama-3-70b prefill": {"T": 4096, "D": 8192}},
    sizes={"T": (0, 9), "D": (1, 600), "residual": [False, True], "gather": [False, True]},
    rows=(0, 1),
)
def make(draw: Draw, T: int, D: int, residual: bool = True, gather: bool = False) -> tuple[Any, ...]:
    """One rank's inputs."""
    return *allreduce_rms_norm.drawn(draw, T=T, D=D, residual=residual), gather


reduce_scatter_rms_norm.builds(BUILDS)


@reduce_scatter_rms_norm.provider("triton", devices=("cuda",), triton=True)
def reduce_scatter_rms_norm_triton(
    x_TD: Tensor, residual_SD: Tensor | None, weight_D: Tensor, eps: float, group_name: str, gather: bool = False
) -> tuple[Tensor, Tensor]:
    shared, ranks = shared_memory(group_name), group_size(group_name)
    if (group_name and (shared is None or not shared.holds(x_TD))) or x_TD.shape[0] % ranks:
        return reduce_scatter_rms_norm_collective(x_TD, residual_SD, weight_D, eps, group_name, gather)
    rows = x_TD.shape[0] // ranks
    with published(x_TD, group_name) as peers_R:
        first_row = group_rank(group_name) * rows
        normed_SD, total_SD = sum_norm(peers_R, x_TD, residual_SD, weight_D, eps, first_row, rows)
    return _gathered(normed_SD, x_TD, group_name) if gather else normed_SD, total_SD


@reduce_scatter_rms_norm.provider("collective", strided=True)
def reduce_scatter_rms_norm_collective(
    x_TD: Tensor, residual_SD: Tensor | None, weight_D: Tensor, eps: float, group_name: str, gather: bool = False
) -> tuple[Tensor, Tensor]:
    summed_SD = reduce_scatter_rows(x_TD, group_name)
    normed_SD, total_SD = normed_sum(summed_SD, residual_SD, weight_D, eps, rms_norm, add_rms_norm)
    return _gathered(normed_SD, x_TD, group_name) if gather else normed_SD, total_SD
