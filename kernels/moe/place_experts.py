"""Which copy of an expert computes each choice, where experts have physical places and some have several.

A token's copy follows from its row and its rank alone: nothing is counted or drawn, every step chooses alike, and as
many rows go to each copy. Source: DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 3.4 (redundant experts).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton


@contract(args={"experts_TK": "[T K] int32", "slots_T": "int64", "table_EC": "[E C] int32"})
def place_experts(experts_TK: Tensor, slots_T: Tensor, table_EC: Tensor, first: int) -> Tensor:
    """Return the place (T, K) int32 of the copy that computes each choice; -1 for a choice of -1.

    table[e] = how many copies expert e has, then their places; row t takes copy (t + first) mod copies, where `first`
    differs from rank to rank. A row whose cache slot is -1 is padding: it goes nowhere, and its places are -1.
    Moves 8·T·K bytes, the slots and a row of the table a choice.
    """
    known_TK = (experts_TK >= 0) & (slots_T >= 0).unsqueeze(1)
    row_TK = experts_TK.clamp(min=0).long()
    turn_T1 = (torch.arange(experts_TK.shape[0], device=experts_TK.device) + first).unsqueeze(1)
    copy_TK = 1 + turn_T1 % table_EC[:, 0][row_TK]
    return torch.where(known_TK, table_EC[row_TK, copy_TK], -1)


def table_of(places: list[int], num_experts: int, width: int) -> list[list[int]]:
    """Return the table (experts, width), -1 filled, of experts at these places: places[p] is the expert at place p.

    Every expert has a place, and fewer than `width` of them.
    """
    copies: list[list[int]] = [[] for _ in range(num_experts)]
    for place, expert in enumerate(places):
        copies[expert].append(place)
    assert all(0 < len(found) < width for found in copies), "an expert has no place, or more than the table's width"
    return [[len(found), *found, *[-1] * (width - 1 - len(found))] for found in copies]


@place_experts.inputs(
    examples=({"T": 1, "K": 1, "E": 1}, {"T": 7, "K": 2, "E": 8, "more": 3}, {"T": 0, "K": 2, "E": 4}),
    shapes={"deepseek-v3 decode": {"T": 64, "K": 8, "E": 256, "more": 32}},
    sizes={"T": (0, 40), "K": [1, 2, 8], "E": (1, 20), "more": (0, 9)},
)
def make(draw: Draw, T: int, K: int, E: int, more: int = 0) -> tuple[Any, ...]:
    """E experts and `more` further copies, of the first ones; some choices are -1, and every third row is padding."""
    slots_T = torch.arange(T, device=draw.device)
    slots_T[2::3] = -1
    place_EC = torch.arange(E * (1 + more), device=draw.device).view(-1, E).T
    place_EC = torch.where(place_EC < E + more, place_EC, -1)
    table_EC = torch.cat(((place_EC >= 0).sum(1, keepdim=True), place_EC), 1).int()
    return draw.integers(-1, E, T, K).int(), slots_T, table_EC, 5


@triton.jit
def _place_experts_kernel(
    experts_ptr, slots_ptr, table_ptr, places_ptr, choices, E, C, K, first, BLOCK: tl.constexpr
):  # fmt: skip
    choice = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside, row = choice < choices, choice // K
    expert = tl.load(experts_ptr + choice, mask=inside, other=-1)
    known = (expert >= 0) & (expert < E) & (tl.load(slots_ptr + row, mask=inside, other=-1) >= 0)
    copies_ptr = table_ptr + expert.to(tl.int64) * C
    turn = (row + first) % tl.load(copies_ptr, mask=known, other=1)
    tl.store(places_ptr + choice, tl.load(copies_ptr + 1 + turn, mask=known, other=-1), mask=inside)


_CONFIG = {"BLOCK": 256, "num_warps": 4}  # unmeasured: a decode step of 64 tokens is two programs
_TYPES = {**dict.fromkeys(("experts_ptr", "table_ptr", "places_ptr"), "*i32"), "slots_ptr": "*i64"}
place_experts.builds([Build(_place_experts_kernel, _CONFIG, _TYPES)])


@place_experts.provider("triton", devices=("cuda",), triton=True)
def place_experts_triton(experts_TK: Tensor, slots_T: Tensor, table_EC: Tensor, first: int) -> Tensor:
    places_TK, choices = torch.empty_like(experts_TK), experts_TK.numel()
    if choices:
        _place_experts_kernel[(triton.cdiv(choices, _CONFIG["BLOCK"]),)](
            experts_TK, slots_T, table_EC, places_TK, choices, *table_EC.shape, experts_TK.shape[1], first, **_CONFIG
        )  # fmt: skip
    return places_TK
