"""Cut a distribution down to its likely tokens: min_p, then top_k, then top_p of what is left.

Each is a threshold on the row's own logits, and all that equals a threshold stays: then neither the order of equal
logits nor the other rows matter (bfloat16 logits tie often). vLLM's and Hugging Face's top_k keep such ties too; their
top_p cuts among equals by the order of its sort. The Triton kernel searches the threshold instead of sorting, over the
integers that order floats, so that it finds it exactly.
Source: top_p: Holtzman et al. 2019, https://arxiv.org/abs/1904.09751; min_p: Nguyen et al. 2024,
https://arxiv.org/abs/2407.01082; the order: https://docs.vllm.ai/en/latest/api/vllm/v1/sample/sampler; searching with
several pivots: https://flashinfer.ai/2025/03/10/sampling.html.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton

from .sampling_triton import from_order, to_order

_SLACK = 64  # equals of the last of top_k that top_p looks at first
# So many tokens tell most rows' top_p: 9 ms against 61 ms for sorting 32 x 49,152 (2 cores). Rows that need more are
# sorted as far as they need: topk takes 4.5 ms for 46,000 of 128,256, a sort 24 ms (1 core).
_FIRST_LOOK = 1024
_BUCKETS = 128


_OPTIONS = {"temperature_R": "float32", "top_k_R": "int64", "top_p_R": "float32", "min_p_R": "float32"}


@contract(args=_OPTIONS, flops=lambda logits_RV: 8 * logits_RV.numel())
def truncate_logits(
    logits_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor
) -> Tensor:
    """Return the logits (R, V) with those outside min_p, then top_k, then top_p set to -inf; a greatest logit stays.

    Probabilities are softmax(logits / temperature), where temperature 0 counts as 1; the logits stay undivided.
    min_p  keeps tokens of at least min_p times the greatest probability; 0 switches it off; float32 (R,)
    top_k  keeps the k most likely and what equals the last of them; 0, -1 and V on switch it off; int64 (R,)
    top_p  of what is left, keeps the fewest most likely tokens of probability p, and what equals the last of them; 1
           switches it off; float32 (R,)
    Moves 2·R·V elements.
    """
    wide_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    ordered = wide_RV.sort(-1, descending=True)
    least_R1, _ = _thresholds(wide_RV, ordered, temperature_R, top_k_R, top_p_R, min_p_R)
    return logits_RV.masked_fill(wide_RV < least_R1, float("-inf"))


def _thresholds(
    wide_RV: Tensor, ordered: tuple[Tensor, Tensor | None], temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor,
    min_p_R: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return each row's least logit that stays, (R, 1), and whether its K greatest logits told, (R,).

    `ordered` are these and their indices, (R, K), K at least each row's top_k; None: every row's top_p is off.
    """
    sorted_RK, index_RK = ordered
    vocab, depth = wide_RV.shape[1], sorted_RK.shape[1]
    hot_R1, k_R1, p_R1, least_R1 = (t.unsqueeze(-1) for t in (temperature_R, top_k_R, top_p_R, min_p_R.log()))
    hot_R1 = torch.where(hot_R1 > 0, hot_R1, 1.0)
    floor_R1 = torch.minimum(sorted_RK[:, :1] + hot_R1 * least_R1, sorted_RK[:, :1])
    kth_R1 = sorted_RK.gather(1, (k_R1 - 1).clamp(0, depth - 1))
    floor_R1 = torch.where((k_R1 > 0) & (k_R1 < vocab), torch.maximum(floor_R1, kth_R1), floor_R1)
    if index_RK is None:
        return floor_R1, torch.ones_like(top_k_R, dtype=torch.bool)
    # softmax and cumsum, unlike logsumexp and sum, add up a row the same way whatever the number of rows.
    sums_RK = (wide_RV / hot_R1).softmax(-1).gather(1, index_RK).cumsum(-1)
    left_R1 = (sorted_RK >= floor_R1).sum(-1, keepdim=True)
    all_left_R1 = floor_R1 == float("-inf")
    mass_R1 = torch.where(all_left_R1, 1.0, sums_RK.gather(1, (left_R1 - 1).clamp(min=0)))
    before_R1 = (sums_RK < p_R1 * mass_R1).sum(-1, keepdim=True)
    reached_R1 = torch.maximum(floor_R1, sorted_RK.gather(1, before_R1.clamp(max=depth - 1)))
    told_R1 = (p_R1 >= 1) | ((before_R1 < depth) & (all_left_R1 | (left_R1 < depth)))
    return torch.where(p_R1 < 1, reached_R1, floor_R1), told_R1.squeeze(-1)


@truncate_logits.inputs(
    examples=(
        {"R": 1, "V": 8}, {"R": 2, "V": 33, "top_k": 5}, {"R": 0, "V": 16}, {"R": 1, "V": 9000, "top_p": 0.9},
        {"R": 3, "V": 300, "top_k": 40, "top_p": 0.7, "min_p": 0.01},
    ),
    shapes={
        "llama-3-8b decode": {"R": 64, "V": 128256, "top_p": 0.95},
        "qwen3-30b-a3b decode": {"R": 256, "V": 151936, "top_k": 20, "top_p": 0.8},
    },
    sizes={"R": (0, 3), "V": (1, 400), "top_k": [-1, 0, 1, 7, 1000], "top_p": [1.0, 0.31, 0.9], "min_p": [0.0, 0.043]},
    rows=(0, 1, 2, 3, 4),
)  # fmt: skip
def make(draw: Draw, R: int, V: int, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> tuple[Any, ...]:
    """Every third row is cut by nothing but what the two others' options leave out."""
    logits_RV = 3 * draw(R, V)
    row = torch.arange(R, device=draw.device) % 3
    temperature_R = 2 * draw.uniform(R)
    top_k_R = torch.where(row == 1, 0, top_k)
    top_p_R = torch.where(row == 2, 1.0, torch.full((R,), top_p, device=draw.device))
    return logits_RV, temperature_R, top_k_R, top_p_R, torch.full((R,), min_p, device=draw.device)


@truncate_logits.provider("partial", devices=("cpu",), strided=True)
def truncate_logits_partial(
    logits_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor
) -> Tensor:
    """Sort a few greatest logits, as many as each kind of row needs; more only where those do not tell."""
    vocab, options = logits_RV.shape[1], (temperature_R, top_k_R, top_p_R, min_p_R)
    limited_R, nucleus_R = (top_k_R > 0) & (top_k_R < vocab), top_p_R < 1
    most = int(torch.where(limited_R, top_k_R, 0).max()) + _SLACK if len(top_k_R) else 0
    groups = (limited_R, most), (nucleus_R & ~limited_R, _FIRST_LOOK), ((min_p_R > 0) & ~nucleus_R & ~limited_R, 1)
    for group_R, depth in groups:
        if len(group_R) and bool(group_R.all()):
            return _truncate(logits_RV, options, min(depth, vocab))
    out_RV = logits_RV.clone()
    for group_R, depth in groups:
        if len(rows := group_R.nonzero().squeeze(-1)):
            out_RV[rows] = _truncate(logits_RV[rows], [o[rows] for o in options], min(depth, vocab))
    return out_RV


def _truncate(logits_RV: Tensor, options: Sequence[Tensor], depth: int) -> Tensor:
    wide_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    sorted_RK, index_RK = wide_RV.topk(depth, dim=-1) if depth > 1 else (wide_RV.amax(-1, keepdim=True), None)
    _, _, top_p_R, _ = options
    ordered = sorted_RK, index_RK if bool((top_p_R < 1).any()) else None
    least_R1, told_R = _thresholds(wide_RV, ordered, *options)
    out_RV = logits_RV.masked_fill(wide_RV < least_R1, float("-inf"))
    if depth < wide_RV.shape[1] and len(rows := (~told_R).nonzero().squeeze(-1)):
        untold = [o[rows] for o in options]
        needed = _depth_of_top_p(wide_RV[rows], *untold)
        deeper = needed if depth < needed < wide_RV.shape[1] else wide_RV.shape[1]
        out_RV[rows] = _truncate(logits_RV[rows], untold, deeper)
    return out_RV


def _depth_of_top_p(wide_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor) -> int:
    """Return how many greatest logits tell every row's top_p, or a few less: by histograms, a fifth of a sort's time.

    A bucket is a quarter of a scaled logit wide; one more is taken, for sums round. What min_p leaves is told whole.
    """
    below_RV = (wide_RV.amax(-1, keepdim=True) - wide_RV) / torch.where(temperature_R > 0, temperature_R, 1.0)[:, None]
    bucket_RV = (4 * below_RV).nan_to_num(0).clamp(max=_BUCKETS - 1).long()
    zeros_RB = wide_RV.new_zeros(len(wide_RV), _BUCKETS)
    mass_RB = zeros_RB.scatter_add(1, bucket_RV, (-below_RV).softmax(-1)).cumsum(-1)
    count_RB = zeros_RB.scatter_add(1, bucket_RV, torch.ones_like(wide_RV)).cumsum(-1)
    last_R1 = 1 + (mass_RB < top_p_R.unsqueeze(-1)).sum(-1, keepdim=True)
    needed_R = count_RB.gather(1, last_R1.clamp(max=_BUCKETS - 1)).squeeze(-1)
    left_R = 1 + (below_RV <= -min_p_R.log().unsqueeze(-1)).sum(-1)
    return int(torch.where((min_p_R > 0) | (top_k_R > 0), left_R, needed_R).max())


@triton.jit
def _masses(row_ptr, V, low, middle, high, top, rate, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """Return the weights (or the number) of a row's logits from three thresholds on."""
    low_sum = tl.zeros([BLOCK], tl.float32)
    middle_sum = tl.zeros([BLOCK], tl.float32)
    high_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        token = start + tl.arange(0, BLOCK)  # [BLOCK]
        logit = tl.load(row_ptr + token, mask=token < V, other=float("-inf")).to(tl.float32)
        weight = tl.exp((logit - top) * rate) if WEIGHTED else tl.full([BLOCK], 1.0, tl.float32)
        low_sum += tl.where(logit >= low, weight, 0.0)
        middle_sum += tl.where(logit >= middle, weight, 0.0)
        high_sum += tl.where(logit >= high, weight, 0.0)
    return tl.sum(low_sum, 0), tl.sum(middle_sum, 0), tl.sum(high_sum, 0)


@triton.jit
def _search(row_ptr, V, floor, target, top, rate, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """Return the greatest threshold, from `floor` to `top`, whose mass reaches the target; that of `floor` does."""
    low, high = to_order(floor), to_order(top) + 1
    while high - low > 1:  # three pivots a pass over the row: at most 16 passes
        step = (high - low + 3) // 4
        a = tl.minimum(low + step, high - 1)
        b = tl.minimum(low + 2 * step, high - 1)
        c = tl.minimum(low + 3 * step, high - 1)
        at_a, at_b, at_c = _masses(row_ptr, V, from_order(a), from_order(b), from_order(c), top, rate, WEIGHTED, BLOCK)
        # A mass never grows with its threshold: rounded sums in one order are monotone too.
        high = tl.where(at_a < target, a, tl.where(at_b < target, b, tl.where(at_c < target, c, high)))
        low = tl.where(at_c >= target, c, tl.where(at_b >= target, b, tl.where(at_a >= target, a, low)))
    return from_order(low)


@triton.jit
def _truncate_logits_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, out_ptr, row_stride, V, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    greatest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        token = start + tl.arange(0, BLOCK)  # [BLOCK]
        logit = tl.load(row_ptr + token, mask=token < V, other=float("-inf"))
        greatest = tl.maximum(greatest, logit.to(tl.float32))
    top = tl.max(greatest, 0)
    temperature = tl.load(temperature_ptr + row)
    temperature = tl.where(temperature > 0, temperature, 1.0)
    rate = 1.0 / temperature
    least = tl.minimum(top + temperature * tl.log(tl.load(min_p_ptr + row)), top)
    top_k = tl.load(top_k_ptr + row)
    if (top_k > 0) & (top_k < V):
        everything = tl.full([], float("-inf"), tl.float32)
        kth = _search(row_ptr, V, everything, top_k.to(tl.float32), top, rate, False, BLOCK)
        least = tl.maximum(least, kth)
    top_p = tl.load(top_p_ptr + row)
    if top_p < 1:
        mass, _, _ = _masses(row_ptr, V, least, least, least, top, rate, True, BLOCK)
        least = _search(row_ptr, V, least, top_p * mass, top, rate, True, BLOCK)
    for start in range(0, V, BLOCK):
        token = start + tl.arange(0, BLOCK)  # [BLOCK]
        logit = tl.load(row_ptr + token, mask=token < V, other=0.0)
        kept = tl.where(logit.to(tl.float32) >= least, logit, float("-inf"))
        tl.store(out_ptr + row * V + token, kept.to(logit.dtype), mask=token < V)


def config(V: int) -> dict[str, int]:
    """Launch configuration. Unmeasured: a row is a program of 16 warps, and stays in L2 between its passes."""
    block = min(triton.next_power_of_2(V), 8192)
    return {"BLOCK": block, "num_warps": max(block // 512, 1)}


_TYPES = {"temperature_ptr": "*fp32", "top_k_ptr": "*i64", "top_p_ptr": "*fp32", "min_p_ptr": "*fp32"}
truncate_logits.builds([Build(_truncate_logits_kernel, config(151936), _TYPES)])


@truncate_logits.provider("triton", devices=("cuda",), triton=True)
def truncate_logits_triton(
    logits_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor
) -> Tensor:
    rows, vocab = logits_RV.shape
    out_RV = torch.empty(rows, vocab, dtype=logits_RV.dtype, device=logits_RV.device)
    if rows:
        _truncate_logits_kernel[(rows,)](
            logits_RV, temperature_R, top_k_R, top_p_R, min_p_R, out_RV, logits_RV.stride(0), vocab, **config(vocab)
        )
    return out_RV
