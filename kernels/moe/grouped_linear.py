"""Linear layers of many experts in one launch: each row by the weight of the expert that it was sent to.

The rows stay where they are: the kernel gathers a tile's tokens by `moe_align`'s order and writes their results to
their slots, so that no permuted copy is made, and the activation between two of these works on slots.

Source: Gale et al. 2022, MegaBlocks, https://arxiv.org/abs/2211.15841; the gather inside the GEMM: Tan et al. 2024,
ScatterMoE, https://arxiv.org/abs/2403.08245.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, Cost, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton
from seamwise.kernels.linear.gemm_tiles import config, configs, store_tile
from seamwise.kernels.linear.scaled_linear import load_tile

from .moe_align import make_groups

# What every grouped op takes of `moe_align`: the slots by expert, and where experts start among them.
GROUPS = {"order_S": "R*top_k int32", "starts_E": "E+1 int32", "bias_EN": "[E N]"}


@contract(
    args=GROUPS, opaque=True, reads_values=True,
    fake=lambda x_RK, weight_ENK, top_k: x_RK.new_empty((x_RK.shape[0] * top_k, weight_ENK.shape[1])),
)  # fmt: skip
def grouped_linear(
    x_RK: Tensor, weight_ENK: Tensor, order_S: Tensor, starts_E: Tensor, top_k: int, bias_EN: Tensor | None = None
) -> Tensor:
    """Return x[s // top_k] @ weight[e]ᵀ + bias[e] for each slot s of each expert e: (S, N) in x's dtype.

    x (R, K): a row a token, or with top_k 1 a row a slot; S = R · top_k. order and starts: int32, of `moe_align`.
    Slots of no expert are zero. Sums in float32; in which order depends on the tile, chosen by S and E, not by the
    other rows. Moves R·K + S·N elements and the weights of the experts with slots; takes 2·S·N·K flops. Raises
    ValueError for an order, starts or biases of other sizes.
    """
    return each_expert(
        order_S, starts_E, top_k, x_RK.new_zeros(order_S.shape[0], weight_ENK.shape[1]),
        lambda e, rows: torch.nn.functional.linear(
            x_RK.index_select(0, rows), weight_ENK[e], None if bias_EN is None else bias_EN[e]
        ),
    )  # fmt: skip


def each_expert(
    order_S: Tensor, starts_E: Tensor, top_k: int, out_SN: Tensor, apply: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Write apply(expert, its rows of x) to the slots of each expert that has any; return `out`."""
    for e, (first, last) in enumerate(pairwise(starts_E.tolist())):
        if first < last:
            slots = order_S[first:last].long()
            out_SN.index_copy_(0, slots, apply(e, slots // top_k if top_k > 1 else slots))
    return out_SN


@grouped_linear.costs
def cost(x_RK: Tensor, weight_ENK: Tensor, order_S: Tensor, starts_E: Tensor, bias_EN: Tensor | None) -> Cost:
    return grouped_cost((x_RK,), (weight_ENK, bias_EN), order_S, starts_E, x_RK.dtype)


def grouped_cost(
    of_rows: tuple[Tensor, ...], of_experts: tuple[Tensor, Tensor | None, *tuple[Tensor | None, ...]], order_S: Tensor,
    starts_E: Tensor, dtype: torch.dtype,
) -> Cost:  # fmt: skip
    """Return the cost of a grouped GEMM that reads `of_rows` whole and of `of_experts` what experts with slots own."""
    (E, N), K, slots = of_experts[0].shape[:2], of_rows[0].shape[1], order_S.shape[0]
    # Sizes without values (a piece's cost): every slot has an expert, and they are as many as can be.
    hit, sent = (min(E, slots), slots) if starts_E.is_meta else (
        int((starts_E[1:] > starts_E[:-1]).sum()), int(starts_E[-1])
    )  # fmt: skip
    read = sum(t.nbytes for t in (*of_rows, order_S, starts_E))
    read += sum(t.nbytes // t.shape[0] for t in of_experts if t is not None) * hit
    return Cost(bytes=read + order_S.numel() * N * dtype.itemsize, flops=2 * sent * N * K)


# The up and down projections of real models: R rows, top_k slots of each, E experts.
SHAPES = {
    "mixtral-8x7b decode up": {"R": 32, "top_k": 2, "E": 8, "N": 28672, "K": 4096},
    "qwen3-30b-a3b decode up": {"R": 1, "top_k": 8, "E": 128, "N": 1536, "K": 2048},
    "qwen3-30b-a3b prefill up": {"R": 4096, "top_k": 8, "E": 128, "N": 1536, "K": 2048},
    "qwen3-30b-a3b prefill down": {"R": 32768, "top_k": 1, "E": 128, "N": 2048, "K": 768},
}


@grouped_linear.inputs(
    examples=(
        {"R": 1, "top_k": 2, "E": 16, "N": 33, "K": 40}, {"R": 5, "top_k": 2, "E": 3, "N": 48, "K": 70, "bias": True},
        {"R": 0, "top_k": 2, "E": 4, "N": 16, "K": 16}, {"R": 6, "top_k": 1, "E": 40, "N": 20, "K": 17, "bias": True},
        {"R": 37, "top_k": 1, "E": 2, "N": 70, "K": 33}, {"R": 40, "top_k": 4, "E": 3, "N": 16, "K": 24},
    ),
    shapes=SHAPES,
    sizes={"R": (0, 20), "top_k": [1, 2, 5], "E": [1, 3, 32], "N": (1, 80), "K": (1, 150), "bias": [False, True]},
)  # fmt: skip
def make(draw: Draw, R: int, top_k: int, E: int, N: int, K: int, bias: bool = False) -> tuple[Any, ...]:
    weight_ENK = (draw.normal(E, N, K) * K**-0.5).to(draw.dtype)
    return draw(R, K), weight_ENK, *make_groups(draw, R, top_k, E), top_k, draw(E, N) if bias else None


@triton.jit
def find_rows(order_ptr, starts_ptr, tile, S, E, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr):
    """Return (expert, slots [BLOCK_T]) of a tile of an expert's rows; slots that it lacks are S.

    Expert E is the slots of none; a greater one, that the tile is beyond the last.
    """
    group = tl.arange(0, BLOCK_E)  # [E], the slots of none included
    begin = tl.load(starts_ptr + group, mask=group <= E, other=S)
    end = tl.load(starts_ptr + group + 1, mask=group < E, other=S)
    tiles_upto = tl.cumsum((end - begin + BLOCK_T - 1) // BLOCK_T, 0)
    before = tiles_upto <= tile
    expert = tl.sum(before.to(tl.int32), 0)
    tile -= tl.max(tl.where(before, tiles_upto, 0), 0)
    at = tl.sum(tl.where(group == expert, begin, 0), 0) + tile * BLOCK_T + tl.arange(0, BLOCK_T)
    last = tl.sum(tl.where(group == expert, end, 0), 0)
    return expert, tl.load(order_ptr + at, mask=at < last, other=S)


@triton.jit
def _tiles_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, order_ptr, starts_ptr, x_stride, expert_stride, column_stride, S, E, N, K,
    TOP_K: tl.constexpr, BIAS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert, slot = find_rows(order_ptr, starts_ptr, tl.program_id(1), S, E, BLOCK_E, BLOCK_T)
    if expert > E:
        return
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    if expert < E:
        x_at, weight_at = (slot // TOP_K).to(tl.int64) * x_stride, column.to(tl.int64) * column_stride
        weight_ptr += expert.to(tl.int64) * expert_stride
        for begin in range(0, K, BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)
            x, weight = load_tile(x_ptr, x_at, slot < S, weight_ptr, weight_at, column < N, k, K)
            sums = tl.dot(x, weight, sums, input_precision="ieee")
        if BIAS:
            bias_ptr += expert * N
        store_tile(sums, out_ptr, bias_ptr, slot, column, S, N, BIAS)
    else:
        store_tile(sums, out_ptr, bias_ptr, slot, column, S, N, False)


@triton.jit
def _vectors_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, order_ptr, starts_ptr, x_stride, expert_stride, column_stride, S, E, N, K,
    TOP_K: tl.constexpr, BIAS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A slot by some columns: where every expert's rows are few, tiles would be padding."""
    at = tl.program_id(1)
    group = tl.arange(0, BLOCK_E)
    end = tl.load(starts_ptr + group + 1, mask=group < E, other=S)
    expert = tl.sum((end <= at).to(tl.int32), 0)
    slot = tl.load(order_ptr + at)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_N], tl.float32)
    if expert < E:
        x_ptr += (slot // TOP_K).to(tl.int64) * x_stride
        weight_ptr += expert.to(tl.int64) * expert_stride
        products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for begin in range(0, K, BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            inside = (column < N)[:, None] & (k < K)[None, :]
            weight_at = column.to(tl.int64)[:, None] * column_stride + k[None, :]
            products += tl.load(weight_ptr + weight_at, mask=inside, other=0.0).to(tl.float32) * x[None, :]
        sums = tl.sum(products, 1)
        if BIAS:
            sums += tl.load(bias_ptr + expert * N + column, mask=column < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + slot.to(tl.int64) * N + column, sums.to(out_ptr.dtype.element_ty), mask=column < N)


def use_vectors(S: int, E: int) -> bool:
    """Whether slots are so few that experts rarely have two: S/2E of the weights at most are read twice."""
    return 4 * S <= E


def tile_config(S: int, E: int, N: int, itemsize: int) -> dict[str, int]:
    """Return the tiles of a GEMM of an expert's mean rows; a step is 128 bytes of K, so that shared memory fits."""
    tiles = config(S // E, N, itemsize)
    del tiles["BAND"]
    return {**tiles, "BLOCK_K": 128 // itemsize, "BLOCK_E": block_experts(E)}


def block_experts(E: int) -> int:
    """Return the lanes that hold every expert, and the slots of none."""
    return triton.next_power_of_2(E + 1)


def tile_configs(itemsize: int) -> Iterator[dict[str, int]]:
    """Yield every tiling that `tile_config` can return, for 256 experts and without its step."""
    for tiles in configs(itemsize):
        yield {k: v for k, v in tiles.items() if k != "BAND"} | {"BLOCK_E": block_experts(256)}


def vector_config(E: int) -> dict[str, int]:
    """Unmeasured: 16 columns of 256 are 32 sums a lane, and 8 programs an SM have 64 KiB of weights on their way."""
    return {"BLOCK_N": 16, "BLOCK_K": 256, "BLOCK_E": block_experts(E), "num_warps": 4}


def num_tiles(S: int, E: int, rows: int) -> int:
    """Return the most tiles that S slots make, however they fall on E experts and on none."""
    return (S + min(S, E + 1) * (rows - 1)) // rows


GROUP_TYPES = {"order_ptr": "*i32", "starts_ptr": "*i32"}


@grouped_linear.builds
def builds(dtype: str) -> Iterator[Build]:
    itemsize = 2 if dtype == "bf16" else 4
    for tiles in tile_configs(itemsize):
        yield Build(_tiles_kernel, {**tiles, "BLOCK_K": 128 // itemsize, "TOP_K": 2, "BIAS": True}, GROUP_TYPES)
    yield Build(_vectors_kernel, {**vector_config(256), "TOP_K": 8, "BIAS": True}, GROUP_TYPES)


def _refuses(x_RK: Tensor, weight_ENK: Tensor) -> str | None:
    if x_RK.dtype != weight_ENK.dtype or x_RK.dtype == torch.float64:
        return f"x and weight must be of one dtype up to 32 bits, got {x_RK.dtype} and {weight_ENK.dtype}"
    return None


@grouped_linear.provider("triton", devices=("cuda",), refuses=_refuses, triton=True)
def grouped_linear_triton(
    x_RK: Tensor, weight_ENK: Tensor, order_S: Tensor, starts_E: Tensor, top_k: int, bias_EN: Tensor | None = None
) -> Tensor:
    """Tiles for the tensor cores, or vectors where slots are few: known only now, for a graph serves every batch."""
    (experts, N, K), slots = weight_ENK.shape, order_S.shape[0]
    out_SN = torch.empty(slots, N, dtype=x_RK.dtype, device=x_RK.device)
    if slots:
        vectors = use_vectors(slots, experts)
        chosen = vector_config(experts) if vectors else tile_config(slots, experts, N, x_RK.element_size())
        kernel = _vectors_kernel if vectors else _tiles_kernel
        tiles = slots if vectors else num_tiles(slots, experts, chosen["BLOCK_T"])
        kernel[(triton.cdiv(N, chosen["BLOCK_N"]), tiles)](
            x_RK, weight_ENK, bias_EN, out_SN, order_S, starts_E, x_RK.stride(0), weight_ENK.stride(0),
            weight_ENK.stride(1), slots, experts, N, K, TOP_K=top_k, BIAS=bias_EN is not None, **chosen,
        )  # fmt: skip
    return out_SN
