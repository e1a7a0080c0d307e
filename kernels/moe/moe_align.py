"""Sorting the chosen experts, so that the rows of each expert lie together for a grouped GEMM.

A slot is one choice: slot t·K + k is the k-th expert of token t. Nothing is padded to a tile: a step's tokens are a
symbolic size when the graph is made, so it is the GEMM's launch that chooses its tile, from real sizes.

Source: counting sort, Knuth, TAOCP 3, section 5.2; its use here: Gale et al. 2022, https://arxiv.org/abs/2211.15841.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton


def _fake(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    T, K = experts_TK.shape
    return experts_TK.new_empty(T * K), experts_TK.new_empty(num_experts + 1)


@contract(args={"experts_TK": "[T K] int32", "expert_map_G": "int32"}, fake=_fake)
def moe_align(experts_TK: Tensor, num_experts: int, expert_map_G: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (order, starts), int32: every slot (T·K,), sorted by expert and then by slot, and where experts start.

    starts (num_experts + 1,): expert e owns order[starts[e] : starts[e + 1]]. Slots of no expert stand last, from
    starts[num_experts] on: those chosen as -1 (a token of padding) or as any number that is not an expert.
    expert_map_G maps the routers' experts to the `num_experts` of this rank, -1 where another rank has it.
    Moves 8·T·K bytes and the starts.
    """
    local_S = experts_TK.flatten()
    if expert_map_G is not None:
        known = (local_S >= 0) & (local_S < expert_map_G.shape[0])
        local_S = torch.where(known, expert_map_G[torch.where(known, local_S, 0).long()], -1)
    local_S = torch.where((local_S >= 0) & (local_S < num_experts), local_S, num_experts).int()
    sorted_S, order_S = local_S.sort(stable=True)
    every_E = torch.arange(num_experts + 1, dtype=torch.int32, device=sorted_S.device)
    return order_S.int(), torch.searchsorted(sorted_S, every_E, out_int32=True)


@moe_align.inputs(
    examples=(
        {"T": 1, "K": 1, "E": 1}, {"T": 7, "K": 2, "E": 8}, {"T": 0, "K": 2, "E": 4}, {"T": 40, "K": 8, "E": 3},
        {"T": 9, "K": 4, "E": 6, "ranks": 2},
    ),
    shapes={
        "qwen3-30b-a3b decode": {"T": 64, "K": 8, "E": 128}, "deepseek-v3 prefill": {"T": 4096, "K": 8, "E": 256},
    },
    sizes={"T": (0, 40), "K": [1, 2, 8], "E": (1, 20), "ranks": [1, 2]},
)  # fmt: skip
def make(draw: Draw, T: int, K: int, E: int, ranks: int = 1) -> tuple[Any, ...]:
    """E experts on each of `ranks` ranks, and this one has every ranks-th; some choices are -1."""
    experts_TK = draw.integers(-1, E * ranks, T, K).int()
    if ranks == 1:
        return experts_TK, E, None
    every = torch.arange(E * ranks, dtype=torch.int32, device=draw.device)
    return experts_TK, E, torch.where(every % ranks == 0, every // ranks, -1)


@triton.jit
def _local_experts(experts_ptr, map_ptr, slot, S, E, G, MAPPED: tl.constexpr):
    """Return the expert of each slot, E where it has none, E + 1 where there is no slot."""
    expert = tl.load(experts_ptr + slot, mask=slot < S, other=-1)
    if MAPPED:
        expert = tl.load(map_ptr + expert, mask=(expert >= 0) & (expert < G), other=-1)
    return tl.where(slot < S, tl.where((expert >= 0) & (expert < E), expert, E), E + 1)


@triton.jit
def _moe_align_kernel(experts_ptr, map_ptr, order_ptr, starts_ptr, S, E, G, MAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """One program an expert, and one for the slots of none: counts the slots before its own, then places its own."""
    mine = tl.program_id(0)
    slot = tl.arange(0, BLOCK)  # [BLOCK]
    lower = tl.zeros([BLOCK], tl.int32)
    for first in range(0, S, BLOCK):
        lower += (_local_experts(experts_ptr, map_ptr, first + slot, S, E, G, MAPPED) < mine).to(tl.int32)
    start = tl.sum(lower, 0)
    tl.store(starts_ptr + mine, start)
    for first in range(0, S, BLOCK):
        own = _local_experts(experts_ptr, map_ptr, first + slot, S, E, G, MAPPED) == mine
        counted = tl.cumsum(own.to(tl.int32), 0)
        tl.store(order_ptr + start + counted - 1, first + slot, mask=own)
        start += tl.sum(own.to(tl.int32), 0)


def config(S: int) -> dict[str, int]:
    """Launch configuration. Unmeasured: a decode step is one block, a prefill of 65,536 slots is 16 of them."""
    block = min(max(triton.next_power_of_2(S), 128), 4096)
    return {"BLOCK": block, "num_warps": min(block // 128, 8)}


_POINTERS = dict.fromkeys(("experts_ptr", "map_ptr", "order_ptr", "starts_ptr"), "*i32")
moe_align.builds(
    Build(_moe_align_kernel, {**config(slots), "MAPPED": mapped}, _POINTERS)
    for slots in (8, 512, 32768) for mapped in (False, True)
)  # fmt: skip


@moe_align.provider("triton", devices=("cuda",), triton=True)
def moe_align_triton(experts_TK: Tensor, num_experts: int, expert_map_G: Tensor | None = None) -> tuple[Tensor, Tensor]:
    slots, known = experts_TK.numel(), 0 if expert_map_G is None else expert_map_G.shape[0]
    order_S = torch.empty(slots, dtype=torch.int32, device=experts_TK.device)
    starts_E = torch.empty(num_experts + 1, dtype=torch.int32, device=experts_TK.device)
    _moe_align_kernel[(num_experts + 1,)](
        experts_TK, expert_map_G, order_S, starts_E, slots, num_experts, known, MAPPED=expert_map_G is not None,
        **config(slots),
    )  # fmt: skip
    return order_S, starts_E


def make_groups(draw: Draw, T: int, K: int, E: int) -> tuple[Any, ...]:
    """Return (order, starts) of random choices, some of none: for the inputs of the grouped ops."""
    return moe_align.meaning(*make(draw, T, K, E))
