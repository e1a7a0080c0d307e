"""Expert parallelism: tokens' rows go to the ranks that own their experts, and the experts' sums come back.

A row goes once to a rank, however many of its experts live there, and comes back as their weighted sum. Every pair of
ranks exchanges `capacity` rows, filled or not: shapes are static, nothing waits for counts, and a CUDA graph holds the
step. Source: Lepikhin et al. 2020 (GShard), https://arxiv.org/abs/2006.16668, section 3.2, for the capacity; DeepEP's
low-latency layout, https://github.com/deepseek-ai/DeepEP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import contract
from seamwise.kernels.draw import Draw

from .collectives import all_to_all_rows, group_rank, group_size


def _undivided(num_experts: int, group_name: str) -> str | None:
    ranks = group_size(group_name)
    return f"{num_experts} experts do not divide among {ranks} ranks" if num_experts % ranks else None


def _empty_dispatch(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, group_name: str, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, choices = experts_TK.shape
    ranks = group_size(group_name)
    slots = ranks * (capacity or tokens)
    return (
        x_TD.new_empty((slots, x_TD.shape[1])), experts_TK.new_empty((slots, choices)),
        weights_TK.new_empty((slots, choices)), x_TD.new_empty((tokens, ranks), dtype=torch.int64),
        x_TD.new_empty((1,), dtype=torch.int64),
    )  # fmt: skip


@contract(
    limits=lambda num_experts, group_name: _undivided(num_experts, group_name), fake=_empty_dispatch, reads_values=True
)
def ep_dispatch(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, num_experts: int, group_name: str, capacity: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (rows (M, D), experts (M, K), weights (M, K), places (T, ranks), dropped (1,)), M = ranks · capacity.

    Rank r owns experts r · E / ranks onwards. Row t of x, float, goes to each owner of experts[t]; an expert of -1 has
    none. Slots r · capacity onwards hold what rank r sent: its rows, their experts counted from this rank's first, -1
    for another rank's, with weight 0; rows of empty slots are zero. `places` says at which slot of each rank a token
    lies, -1 where at none; int64. Capacity 0 is T, which loses nothing; a lower one saves traffic, and `dropped`,
    int64, counts the rows that found no slot: results are wrong unless it is zero on every rank, which the caller
    checks. Every rank has the same T. Moves M·(D + 2·K) elements. Raises ValueError where experts do not divide.
    """
    ranks, tokens = group_size(group_name), x_TD.shape[0]
    capacity, share = capacity or tokens, num_experts // ranks
    rank_R = torch.arange(ranks, device=x_TD.device)
    owner_TK = torch.where(experts_TK >= 0, experts_TK // share, -1)
    wanted_TR = (owner_TK.unsqueeze(-1) == rank_R).any(1)
    place_TR = wanted_TR.cumsum(0) - 1
    sent_TR = wanted_TR & (place_TR < capacity)
    # The token of every slot; token T is no token, and what finds no slot is written beyond the last.
    token_M = torch.full((ranks * capacity + 1,), tokens, device=x_TD.device)
    slot_TR = torch.where(sent_TR, rank_R * capacity + place_TR, ranks * capacity)
    every_TR = torch.arange(tokens, device=x_TD.device).unsqueeze(1).expand_as(slot_TR)
    token_M = token_M.scatter(0, slot_TR.flatten(), every_TR.flatten())[:-1]

    def exchange(rows_TX: Tensor, empty: int) -> Tensor:
        padded = torch.cat((rows_TX, rows_TX.new_full((1, rows_TX.shape[1]), empty)))
        return all_to_all_rows(padded[token_M].unflatten(0, (ranks, capacity)), group_name).flatten(0, 1)

    local_MK = exchange(experts_TK, -1) - group_rank(group_name) * share
    own_MK = (local_MK >= 0) & (local_MK < share)
    weights_MK = exchange(weights_TK, 0).where(own_MK, 0)
    places_TR = torch.where(sent_TR, place_TR, -1)
    dropped = (wanted_TR & ~sent_TR).sum().unsqueeze(0)
    return exchange(x_TD, 0), local_MK.where(own_MK, -1), weights_MK, places_TR, dropped


@ep_dispatch.inputs(
    examples=(
        {"T": 1, "K": 1, "E": 1, "D": 8}, {"T": 7, "K": 2, "E": 8, "D": 33}, {"T": 0, "K": 2, "E": 4, "D": 8},
        {"T": 9, "K": 4, "E": 8, "D": 16, "capacity": 5},
    ),
    shapes={"deepseek-v3 decode": {"T": 64, "K": 8, "E": 256, "D": 7168}},
    sizes={"T": (0, 9), "K": (1, 4), "E": [4, 16], "D": [8, 33], "capacity": [0, 3]},
)  # fmt: skip
def make_dispatch(draw: Draw, T: int, K: int, E: int, D: int, capacity: int = 0) -> tuple[Any, ...]:
    """One rank's inputs: K different experts a token, every third token being padding."""
    x_TD = draw(T, D)
    experts_TK = draw.uniform(T, E).argsort(-1)[:, :K]
    experts_TK[2::3] = -1
    return x_TD, experts_TK, draw.uniform(T, K), E, "", capacity


@contract(
    fake=lambda y_MD, places_TR: y_MD.new_empty((places_TR.shape[0], y_MD.shape[1])), reads_values=True,
    flops=lambda y_MD: y_MD.numel(),
)  # fmt: skip
def ep_combine(y_MD: Tensor, places_TR: Tensor, group_name: str) -> Tensor:
    """Return each token's sum of what its ranks made of it: (T, D) in y's dtype, summed wider in the ranks' order.

    y (ranks · capacity, D) holds, slot by slot as `ep_dispatch` filled them, the weighted sums over this rank's
    experts; places are those of `ep_dispatch`. Moves ranks · capacity · D elements.
    """
    wide = torch.promote_types(y_MD.dtype, torch.float32)
    ranks = places_TR.shape[1]
    back_RCD = all_to_all_rows(y_MD.unflatten(0, (ranks, y_MD.shape[0] // ranks)), group_name)
    total_TD = torch.zeros(places_TR.shape[0], y_MD.shape[1], dtype=wide, device=y_MD.device)
    for back_CD, place_T in zip(back_RCD.unbind(0), places_TR.unbind(1), strict=True):
        row_TD = back_CD[place_T.clamp(min=0)].to(wide)
        total_TD = total_TD + row_TD.masked_fill((place_T < 0).unsqueeze(1), 0)
    return total_TD.to(y_MD.dtype)


@ep_combine.inputs(
    examples=({"T": 1, "D": 8}, {"T": 7, "D": 33}, {"T": 0, "D": 8}),
    shapes={"deepseek-v3 decode": {"T": 64, "D": 7168}},
    sizes={"T": (0, 9), "D": [8, 33]},
    rows=(1,),
)
def make_combine(draw: Draw, T: int, D: int) -> tuple[Any, ...]:
    """One rank's inputs: every third token is nowhere."""
    y_MD = draw(T, D)
    places_T1 = draw.permutation(T).unsqueeze(1)
    places_T1[2::3] = -1
    return y_MD, places_T1, ""
