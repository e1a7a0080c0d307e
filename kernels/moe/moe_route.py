"""Choosing the experts of each token, and their weights, from the router's logits.

score   of               choice                                  weight
softmax Mixtral, Qwen3   the largest logits                      softmax(logits), divided by their sum: normalize
        gpt-oss          the same                                softmax of the chosen logits = softmax, normalize
        DeepSeek-V2      within the groups of the best expert    softmax(logits) · scaling
sigmoid DeepSeek-V3      scores + bias, within the groups whose  sigmoid(logits), without the bias, normalize, scaling
                         two best sum highest

Source: Jiang et al. 2024, https://arxiv.org/abs/2401.04088, section 2.1; DeepSeek-V2, https://arxiv.org/abs/2405.04434,
section 2.2.2; DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 2.1.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton


def limits_route(
    logits_TE: Tensor, top_k: int, score: str, bias_E: Tensor | None, num_groups: int, top_groups: int
) -> str | None:
    """Return what is wrong with arguments of `moe_route`, or None."""
    experts = logits_TE.shape[-1]
    if score not in ("softmax", "sigmoid"):
        return f"score {score!r} is not 'softmax' or 'sigmoid'; a softmax of the chosen is 'softmax' with normalize"
    if num_groups and (experts % num_groups or not 0 < top_groups <= num_groups):
        return f"wanted groups that divide {experts} experts and some of them; got {top_groups} of {num_groups} groups"
    if num_groups and bias_E is not None and experts == num_groups:
        return f"with a bias a group stands by its two best; {num_groups} groups of {experts} experts have one each"
    if not 0 < top_k <= (reachable := experts // num_groups * top_groups if num_groups else experts):
        return f"top_k is {top_k}, wanted 1 to {reachable}: the experts that can be chosen"
    return None


@contract(limits=limits_route, flops=lambda logits_TE, top_k: (4 + top_k) * logits_TE.numel())
def moe_route(
    logits_TE: Tensor, top_k: int, score: str, normalize: bool = True, scaling: float = 1.0,
    bias_E: Tensor | None = None, num_groups: int = 0, top_groups: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (weights, experts): (T, top_k) float32 and int32, best expert first; of equals, the lower.

    score       "softmax" or "sigmoid" of the logits, in float32 or wider; normalize divides the chosen by their sum
    bias_E      added to the scores for choosing, never to the weights
    num_groups  of consecutive experts, of which the best `top_groups` may be chosen from (0: all). A group stands by
                its best expert, or with a bias by its two best, added
    A logit that is NaN is chosen first, so that it shows. Moves the logits and 8·T·top_k bytes.
    Raises ValueError for another score, or for more experts or groups than there are.
    """
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    score_TE = logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()
    # Without a bias the logits themselves choose: rounding makes scores equal whose logits differ.
    choice_TE = logits_TE if bias_E is None else score_TE + bias_E
    if num_groups:
        choice_TGP = choice_TE.unflatten(-1, (num_groups, -1))
        group_TG = choice_TGP.topk(1 if bias_E is None else 2, -1).values.sum(-1)
        kept = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(-1, _largest(group_TG, top_groups), True)
        choice_TE = choice_TGP.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
    experts_TK = _largest(choice_TE, top_k)
    weights_TK = score_TE.gather(-1, experts_TK)
    if normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return weights_TK * scaling, experts_TK.int()


def _largest(values: Tensor, count: int) -> Tensor:
    """Return the indices of the largest; topk leaves open which of equals it takes, a stable sort does not."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]


@moe_route.inputs(
    examples=(
        {"T": 1, "E": 8, "K": 2}, {"T": 3, "E": 33, "K": 8, "sigmoid": True}, {"T": 0, "E": 8, "K": 2},
        {"T": 5, "E": 48, "K": 4, "groups": 4, "sigmoid": True, "biased": True}, {"T": 2, "E": 20, "K": 6, "groups": 4},
        {"T": 4, "E": 16, "K": 16, "biased": True},
    ),
    shapes={
        "qwen3-30b-a3b prefill": {"T": 4096, "E": 128, "K": 8},
        "deepseek-v3 decode": {"T": 64, "E": 256, "K": 8, "groups": 8, "sigmoid": True, "biased": True},
    },
    sizes={
        "T": (0, 6), "E": [8, 24, 64], "K": (1, 4), "groups": [0, 4], "sigmoid": [False, True],
        "biased": [False, True], "normalize": [False, True],
    },
    rows=(0,),
)  # fmt: skip
def make(
    draw: Draw, T: int, E: int, K: int, groups: int = 0, sigmoid: bool = False, biased: bool = False,
    normalize: bool = True,
) -> tuple[Any, ...]:  # fmt: skip
    """Half of the groups may be chosen."""
    logits_TE = draw(T, E)
    bias_E = draw.normal(E) if biased else None
    return logits_TE, K, "sigmoid" if sigmoid else "softmax", normalize, 2.5, bias_E, groups, groups // 2


@triton.jit
def store_route(
    logits_ptr, bias_ptr, weights_ptr, experts_ptr, K, groups, size, top_groups, scaling, SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr, BIASED: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Route the row at logits_ptr, its experts as `groups` rows of `size`; write K weights and experts."""
    lowest = float("-inf")
    group = tl.arange(0, BLOCK_G)  # [G]
    member = tl.arange(0, BLOCK_P)[None, :]  # [1, P]
    left = (group[:, None] < groups) & (member < size)  # [G, P], what may still be chosen
    expert = tl.where(left, group[:, None] * size + member, -1)
    choice = tl.load(logits_ptr + expert, mask=left, other=lowest).to(tl.float32)
    if SIGMOID:
        score = tl.sigmoid(choice)
    else:
        raised = tl.exp(choice - tl.max(tl.max(choice, 1), 0))
        score = raised / tl.sum(tl.sum(raised, 1), 0)
    if BIASED:
        choice = score + tl.load(bias_ptr + expert, mask=left, other=lowest).to(tl.float32)
    choice = tl.where(choice != choice, float("inf"), choice)
    if BLOCK_G > 1:
        best = tl.max(choice, 1)  # [G]
        if BIASED:
            first = tl.min(tl.where(choice == best[:, None], member, BLOCK_P), 1)
            best += tl.max(tl.where(member == first[:, None], lowest, choice), 1)
        lower = (best[None, :] == best[:, None]) & (group[None, :] < group[:, None])
        rank = tl.sum(((best[None, :] > best[:, None]) | lower).to(tl.int32), 1)
        left = left & (rank < top_groups)[:, None]
    # One axis from here on: [E].
    left, expert = tl.reshape(left, [BLOCK_G * BLOCK_P]), tl.reshape(expert, [BLOCK_G * BLOCK_P])
    choice, score = tl.reshape(choice, [BLOCK_G * BLOCK_P]), tl.reshape(score, [BLOCK_G * BLOCK_P])
    place = tl.arange(0, BLOCK_K)  # [K]
    weights, experts = tl.zeros([BLOCK_K], tl.float32), tl.zeros([BLOCK_K], tl.int32)
    for k in range(K):
        best_left = tl.max(tl.where(left, choice, lowest), 0)
        index = tl.min(tl.where(left & (choice == best_left), expert, BLOCK_G * BLOCK_P), 0)
        left = left & (expert != index)
        weights = tl.where(place == k, tl.sum(tl.where(expert == index, score, 0.0), 0), weights)
        experts = tl.where(place == k, index, experts)
    if NORMALIZE:
        weights = weights / (tl.sum(weights, 0) + 1e-20)
    tl.store(weights_ptr + place, weights * tl.cast(scaling, tl.float32), mask=place < K)
    tl.store(experts_ptr + place, experts, mask=place < K)


@triton.jit
def _moe_route_kernel(
    logits_ptr, bias_ptr, weights_ptr, experts_ptr, logits_stride, K, groups, size, top_groups, scaling,
    SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, BIASED: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    store_route(
        logits_ptr + row * logits_stride, bias_ptr, weights_ptr + row * K, experts_ptr + row * K, K, groups, size,
        top_groups, scaling, SIGMOID, NORMALIZE, BIASED, BLOCK_G, BLOCK_P, BLOCK_K,
    )  # fmt: skip


def route_config(experts: int, top_k: int, score: str, normalize: bool, biased: bool, groups: int) -> dict[str, Any]:
    """Return the constants of `store_route`."""
    return {
        "SIGMOID": score == "sigmoid", "NORMALIZE": normalize, "BIASED": biased,
        "BLOCK_G": triton.next_power_of_2(groups or 1), "BLOCK_P": triton.next_power_of_2(experts // (groups or 1)),
        "BLOCK_K": triton.next_power_of_2(top_k),
    }  # fmt: skip


ROUTE_TYPES = {"bias_ptr": "*fp32", "weights_ptr": "*fp32", "experts_ptr": "*i32", "scaling": "fp32"}
# Mixtral, Qwen3-30B-A3B, DeepSeek-V2, DeepSeek-V3: experts, top_k, score, normalize, biased, groups.
ROUTES = (
    (8, 2, "softmax", True, False, 0), (128, 8, "softmax", True, False, 0), (160, 6, "softmax", False, False, 8),
    (256, 8, "sigmoid", True, True, 8),
)  # fmt: skip


moe_route.builds(Build(_moe_route_kernel, {**route_config(*route), "num_warps": 1}, ROUTE_TYPES) for route in ROUTES)


@moe_route.provider("triton", devices=("cuda",), triton=True)
def moe_route_triton(
    logits_TE: Tensor, top_k: int, score: str, normalize: bool = True, scaling: float = 1.0,
    bias_E: Tensor | None = None, num_groups: int = 0, top_groups: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One warp a row. Unmeasured: 256 experts are eight values a lane, and no reduction leaves the warp."""
    rows, experts = logits_TE.shape
    weights_TK, experts_TK = empty_routes(logits_TE, top_k)
    if rows:
        groups = num_groups or 1
        _moe_route_kernel[(rows,)](
            logits_TE, bias_E, weights_TK, experts_TK, logits_TE.stride(0), top_k, groups, experts // groups,
            top_groups or 1, scaling, **route_config(experts, top_k, score, normalize, bias_E is not None, num_groups),
            num_warps=1,
        )  # fmt: skip
    return weights_TK, experts_TK


def empty_routes(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Allocate the results of a routing."""
    shape, device = (logits_TE.shape[0], top_k), logits_TE.device
    return torch.empty(shape, dtype=torch.float32, device=device), torch.empty(shape, dtype=torch.int32, device=device)
