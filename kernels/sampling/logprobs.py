"""Log probabilities of chosen and of the most likely tokens, without a matrix of them on a GPU.

A program reads a block of a row once, for its part of the softmax's normalizer (Milakov and Gimelshein 2018,
https://arxiv.org/abs/1805.02867), its greatest logits, and how many exceed the chosen one; another joins the blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton

from .sampling_triton import from_order, log1p, to_order

_MOST = 128  # top tokens that the Triton kernel serves: of 64 blocks they are 8192 keys, which one program joins
_SLACK = 8  # equal logits beyond num_top that the CPU provider looks at before it sorts rows whole


def _limits(logits_RV: Tensor, num_top: int) -> str | None:
    vocab = logits_RV.shape[1]
    return None if 0 <= num_top <= vocab else f"num_top is {num_top}, wanted 0 to {vocab} (the vocabulary)"


@contract(args={"chosen_R": "int64"}, limits=_limits, flops=lambda logits_RV: 4 * logits_RV.numel())
def logprobs(logits_RV: Tensor, chosen_R: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log_softmax(logits) at the chosen ids (R,), their ranks, and the num_top most likely ids' with these.

    Results: (R,) float32 or wider; (R,) int64, 1 + how many logits exceed the chosen one (vLLM also counts its equals);
    (R, num_top) like the first, falling; (R, num_top) int64, the lower id first among equals.
    Moves R·V elements and takes 4·R·V flops. Raises ValueError when num_top is not from 0 to V.
    """
    wide_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    return _of_ids(wide_RV, chosen_R, wide_RV.argsort(dim=-1, descending=True, stable=True)[:, :num_top])


def _of_ids(wide_RV: Tensor, chosen_R: Tensor, ids_RK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprobs_RV, chosen_R1 = wide_RV.log_softmax(-1), chosen_R.unsqueeze(-1)
    ranks_R = 1 + (wide_RV > wide_RV.gather(1, chosen_R1)).sum(-1)
    return logprobs_RV.gather(1, chosen_R1).squeeze(-1), ranks_R, logprobs_RV.gather(1, ids_RK), ids_RK.contiguous()


@logprobs.inputs(
    examples=(
        {"R": 1, "V": 8, "num_top": 3}, {"R": 3, "V": 33, "num_top": 33}, {"R": 0, "V": 16, "num_top": 1},
        {"R": 2, "V": 4500, "num_top": 20}, {"R": 2, "V": 40, "num_top": 0},
    ),
    shapes={
        "llama-3-8b decode": {"R": 64, "V": 128256, "num_top": 5},
        "qwen3-30b-a3b decode": {"R": 256, "V": 151936, "num_top": 20},
    },
    sizes={"R": (0, 4), "V": (8, 600), "num_top": [0, 1, 5, 8], "coarse": [False, True]},
    rows=(0, 1),
)  # fmt: skip
def make(draw: Draw, R: int, V: int, num_top: int, coarse: bool = False) -> tuple[Any, ...]:
    """`coarse` logits tie often."""
    logits_RV = 3 * draw.normal(R, V)
    logits_RV = logits_RV.round() if coarse else logits_RV
    return logits_RV.to(draw.dtype), draw.integers(0, V, R), num_top


@logprobs.provider("partial", devices=("cpu",), strided=True)
def logprobs_partial(logits_RV: Tensor, chosen_R: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Order a few greatest logits; whole rows only where more of them are equal."""
    rows, vocab = logits_RV.shape
    if not rows:
        return logprobs.meaning(logits_RV, chosen_R, num_top)
    wide_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    values_RD, ids_RD = wide_RV.topk(min(num_top + _SLACK, vocab), dim=-1)
    tied_R = values_RD[:, max(num_top - 1, 0)] == values_RD[:, -1]
    ids_RD = ids_RD.sort(-1).values
    order_RD = wide_RV.gather(1, ids_RD).argsort(dim=-1, descending=True, stable=True)
    ids_RK = ids_RD.gather(1, order_RD)[:, :num_top]
    if len(tied := tied_R.nonzero().squeeze(-1)):
        ids_RK[tied] = wide_RV[tied].argsort(dim=-1, descending=True, stable=True)[:, :num_top]
    return _of_ids(wide_RV, chosen_R, ids_RK)


@triton.jit
def _chosen(row_ptr, chosen_ptr, V):
    """Return the chosen id's logit; that of an id outside the vocabulary, which is not read, is NaN."""
    token = tl.load(chosen_ptr)
    return tl.load(row_ptr + token, mask=(token >= 0) & (token < V), other=float("nan")).to(tl.float32)


@triton.jit
def _block_kernel(
    logits_ptr, chosen_ptr, keys_ptr, greatest_ptr, sums_ptr, greater_ptr, row_stride, V, splits, num_top,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = split * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    logit = tl.load(logits_ptr + row * row_stride + token, mask=token < V, other=float("-inf")).to(tl.float32)
    chosen = _chosen(logits_ptr + row * row_stride, chosen_ptr + row, V)
    greatest, first = tl.max(logit, 0, return_indices=True)
    others = (tl.arange(0, BLOCK) != first) & (logit > float("-inf"))
    total = tl.sum(tl.where(others, tl.exp(logit - greatest), 0.0), 0)
    at = row * splits + split
    tl.store(greatest_ptr + at, greatest)
    tl.store(sums_ptr + at, total)
    tl.store(greater_ptr + at, tl.sum((logit > chosen).to(tl.int32), 0))
    # Keys order by logit, then by falling id; the id is in the lower half.
    key = (to_order(logit) << 32) + (0x7FFFFFFF - token).to(tl.int64)
    for rank in range(num_top):  # a few rounds of maxima: sorting a block compiles for a minute
        best = tl.max(key, 0)
        tl.store(keys_ptr + at * num_top + rank, best)
        key = tl.where(key == best, -(2**63), key)


@triton.jit
def _join_kernel(
    logits_ptr, chosen_ptr, keys_ptr, greatest_ptr, sums_ptr, greater_ptr, own_ptr, ranks_ptr, top_ptr, ids_ptr,
    row_stride, V, splits, num_top, SPLITS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)  # [SPLITS]
    known = split < splits
    greatest = tl.load(greatest_ptr + row * splits + split, mask=known, other=float("-inf"))
    sums = tl.load(sums_ptr + row * splits + split, mask=known, other=0.0)
    largest, first = tl.max(greatest, 0, return_indices=True)
    # Every block's sum leaves its greatest logit out, so that the logarithm of 1 + the rest is exact near certainty.
    rest = tl.where(split == first, sums, (1.0 + sums) * tl.exp(greatest - largest))
    normalizer = log1p(tl.sum(tl.where(greatest > float("-inf"), rest, 0.0), 0))
    chosen = _chosen(logits_ptr + row * row_stride, chosen_ptr + row, V)
    tl.store(own_ptr + row, chosen - largest - normalizer)
    greater = tl.load(greater_ptr + row * splits + split, mask=known, other=0)
    tl.store(ranks_ptr + row, 1 + tl.sum(greater, 0).to(tl.int64))
    member = tl.arange(0, KEYS)  # [KEYS]
    known = member < splits * num_top
    keys = tl.load(keys_ptr + row * splits * num_top + member, mask=known, other=-(2**63))
    for rank in range(num_top):
        best = tl.max(keys, 0)
        tl.store(top_ptr + row * num_top + rank, from_order(best >> 32) - largest - normalizer)
        tl.store(ids_ptr + row * num_top + rank, 0x7FFFFFFF - (best & 0x7FFFFFFF))
        keys = tl.where(keys == best, -(2**63), keys)


def config(V: int) -> dict[str, int]:
    """Launch configuration of the blocks. Unmeasured: 4096 columns a program, 38 of them for a row of 152k."""
    block = min(triton.next_power_of_2(V), 4096)
    return {"BLOCK": block, "num_warps": max(block // 512, 1)}


def join_config(splits: int, num_top: int) -> dict[str, int]:
    """Launch configuration of the joining program. Unmeasured."""
    keys = triton.next_power_of_2(max(splits * num_top, 1))
    return {"SPLITS": triton.next_power_of_2(splits), "KEYS": keys, "num_warps": min(max(keys // 512, 1), 16)}


_TYPES = dict.fromkeys(("greatest_ptr", "sums_ptr", "own_ptr", "top_ptr"), "*fp32") | {"greater_ptr": "*i32"}
_TYPES |= dict.fromkeys(("chosen_ptr", "keys_ptr", "ranks_ptr", "ids_ptr"), "*i64")
logprobs.builds(
    [
        Build(_block_kernel, config(151936), _TYPES),
        *(Build(_join_kernel, join_config(64, num_top), _TYPES) for num_top in (1, 20, _MOST)),
    ]
)


def _refuses(num_top: int) -> str | None:
    return f"num_top is {num_top}, wanted at most {_MOST}" if num_top > _MOST else None


@logprobs.provider("triton", devices=("cuda",), refuses=_refuses, triton=True)
def logprobs_triton(logits_RV: Tensor, chosen_R: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (rows, vocab), device = logits_RV.shape, logits_RV.device
    chosen = config(vocab)
    splits = triton.cdiv(vocab, chosen["BLOCK"])

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    results = (
        empty(torch.float32, rows), empty(torch.int64, rows), empty(torch.float32, rows, num_top),
        empty(torch.int64, rows, num_top),
    )  # fmt: skip
    if rows:
        parts = (
            empty(torch.int64, rows, splits, num_top), empty(torch.float32, rows, splits),
            empty(torch.float32, rows, splits), empty(torch.int32, rows, splits),
        )  # fmt: skip
        stride = logits_RV.stride(0)
        _block_kernel[(rows, splits)](logits_RV, chosen_R, *parts, stride, vocab, splits, num_top, **chosen)
        _join_kernel[(rows,)](
            logits_RV, chosen_R, *parts, *results, stride, vocab, splits, num_top, **join_config(splits, num_top)
        )
    return results
