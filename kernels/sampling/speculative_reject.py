"""Accept or replace drafted tokens so that what comes out is distributed as the target model's own tokens.

Draft token x is accepted with probability min(1, p(x) / q(x)); the first that is not is replaced by a draw from
max(p - q, 0), normalized; when all are accepted, one more token is drawn from the target.
Source: Leviathan et al. 2022, https://arxiv.org/abs/2211.17192, algorithm 1; Chen et al. 2023,
https://arxiv.org/abs/2302.01318, algorithm 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, Cost, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton

from .sampling_noise import ACCEPT, DRAW, RECOVER, draw_key, draw_keys, gumbel, gumbel_noise, uniform, uniform_noise

_ARGS = {
    "draft_ids_N": "int64", "draft_probs_NV": "float32", "starts_R1": "R+1 int64", "logits_MV": "N+R V",
    "temperature_R": "float32", "seeds_R": "int64", "positions_R": "int64",
}  # fmt: skip


@contract(args=_ARGS)
def speculative_reject(
    draft_ids_N: Tensor, draft_probs_NV: Tensor | None, starts_R1: Tensor, logits_MV: Tensor, temperature_R: Tensor,
    seeds_R: Tensor, positions_R: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (tokens, counts): the tokens of each request, accepted and then one more, and how many they are.

    draft_ids_N     (N,) int64; request r drafted those of starts[r] : starts[r + 1]
    draft_probs_NV  (N, V) float32, the distribution that each was drawn from; None: each was certain
    starts_R1       (R + 1,) int64, from 0 to N
    logits_MV       (N + R, V): the target's before each draft token and after the last, from row starts[r] + r on
    temperature_R   (R,) float32, divides the target's logits; 0 is greedy: a draft token must be the first argmax
    seeds_R, positions_R  (R,) int64, of the noise: that of the first draft token; the others follow
    Results: (N + R,) int64, laid out as the logits' rows, -1 behind a request's last token; (R,) int64.
    What replaces a token does not depend on the noise that gumbel_sample draws drafts with; the token after all drafts
    is the one that gumbel_sample draws at that position.
    Reads N·V logits and probabilities, of which one row a request twice.
    """
    drafts, requests, device = len(draft_ids_N), len(seeds_R), draft_ids_N.device
    wide_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    request_N = torch.repeat_interleave(starts_R1.diff(), output_size=drafts)
    place_N = torch.arange(drafts, device=device) - starts_R1[request_N]
    row_N = torch.arange(drafts, device=device) + request_N
    hot_N, noise_N = temperature_R[request_N], positions_R[request_N] + place_N
    probs_NV = (wide_MV[row_N] / torch.where(hot_N > 0, hot_N, 1.0).unsqueeze(-1)).softmax(-1)
    p_N = probs_NV.gather(1, draft_ids_N.unsqueeze(-1)).squeeze(-1)
    q_N = torch.ones_like(p_N) if draft_probs_NV is None else draft_probs_NV.gather(1, draft_ids_N.unsqueeze(-1))[:, 0]
    u_N = uniform_noise(draw_keys(seeds_R[request_N], noise_N, ACCEPT), 1).squeeze(-1)
    accepted_N = torch.where(hot_N > 0, u_N * q_N < p_N, wide_MV[row_N].argmax(-1) == draft_ids_N)
    # A draft token counts when no earlier one of its request was rejected: rejections up to it, less those before.
    rejected_N1 = torch.nn.functional.pad((~accepted_N).cumsum(0), (1, 0))
    counted_N = rejected_N1[1:] == rejected_N1[starts_R1[request_N]]
    counts_R = torch.zeros(requests, dtype=torch.int64, device=device).index_add(0, request_N, counted_N.long())

    # The row that decides each request's last token, and the draft that it replaces, if any.
    last_R = starts_R1[:-1] + torch.arange(requests, device=device) + counts_R
    replaced_R = counts_R < starts_R1[1:] - starts_R1[:-1]
    hot_R1, where_R = temperature_R.unsqueeze(-1), positions_R + counts_R
    scaled_RV = wide_MV[last_R] / torch.where(hot_R1 > 0, hot_R1, 1.0)
    draft_R = (starts_R1[:-1] + counts_R).clamp(max=max(drafts - 1, 0))
    q_RV = torch.zeros_like(scaled_RV)
    if drafts and draft_probs_NV is not None:
        q_RV = draft_probs_NV[draft_R].to(q_RV.dtype)
    elif drafts:
        q_RV = q_RV.scatter(1, draft_ids_N[draft_R].unsqueeze(-1), 1.0)
    rest_RV = (scaled_RV.softmax(-1) - q_RV).clamp(min=0)
    # Rounding can reject where nothing is left, p = q: then the target itself is drawn from.
    left_R1 = replaced_R.unsqueeze(-1) & (rest_RV > 0).any(-1, keepdim=True)
    weights_RV = torch.where(left_R1, rest_RV.log(), scaled_RV)
    keys_R = torch.where(replaced_R, draw_keys(seeds_R, where_R, RECOVER), draw_keys(seeds_R, where_R, DRAW))
    noisy_RV = weights_RV + gumbel_noise(keys_R, logits_MV.shape[1])
    final_R = torch.where(hot_R1 > 0, noisy_RV, wide_MV[last_R]).argmax(-1)

    tokens_M = torch.full((drafts + requests,), -1, dtype=torch.int64, device=device)
    tokens_M[row_N] = torch.where(counted_N, draft_ids_N, -1)
    tokens_M[last_R] = final_R
    return tokens_M, counts_R + 1


@speculative_reject.costs
def cost(draft_probs_NV: Tensor | None, logits_MV: Tensor, seeds_R: Tensor) -> Cost:
    probs = 0 if draft_probs_NV is None else 4 * len(seeds_R) * logits_MV.shape[1]
    return Cost(bytes=logits_MV.nbytes + probs + 32 * len(logits_MV), flops=4 * logits_MV.numel())


@speculative_reject.inputs(
    examples=(
        {"R": 1, "V": 8, "drafted": 2}, {"R": 3, "V": 33, "drafted": 3, "certain": True}, {"R": 2, "V": 16},
        {"R": 0, "V": 16}, {"R": 3, "V": 4500, "drafted": 2},
    ),
    shapes={
        "llama-3-8b, 4 drafted": {"R": 32, "V": 128256, "drafted": 4},
        "deepseek-v3 mtp": {"R": 64, "V": 129280, "drafted": 1, "certain": True},
    },
    sizes={"R": (0, 5), "V": (1, 300), "drafted": (0, 4), "certain": [False, True]},
)  # fmt: skip
def make(draw: Draw, R: int, V: int, drafted: int = 0, certain: bool = False) -> tuple[Any, ...]:
    """`drafted` is the most a request has, and the first has it; every third is greedy; the draft is close."""
    counts_R = draw.integers(0, drafted + 1, R)
    counts_R[:1] = drafted
    drafts = int(counts_R.sum())
    starts_R1 = torch.nn.functional.pad(counts_R.cumsum(0), (1, 0))
    logits_MV = 2 * draw.normal(drafts + R, V)
    each_R = torch.arange(R, device=draw.device)
    row_N = torch.arange(drafts, device=draw.device) + torch.repeat_interleave(each_R, counts_R)
    draft_NV = (logits_MV[row_N] + draw.normal(drafts, V)).softmax(-1)
    ids_N = torch.multinomial(draft_NV, 1, generator=draw.generator)[:, 0] if drafts else draw.permutation(0)
    greedy_R = each_R % 3 == 1
    ids_N = torch.where(greedy_R.repeat_interleave(counts_R), logits_MV[row_N].to(draw.dtype).argmax(-1), ids_N)
    temperature_R = draw.uniform(R).add(0.2).masked_fill(greedy_R, 0.0)
    seeds_R = draw.integers(-(2**63), 2**63 - 1, R)
    probs_NV = None if certain else draft_NV
    return ids_N, probs_NV, starts_R1, logits_MV.to(draw.dtype), temperature_R, seeds_R, each_R * 7


@triton.jit
def _accept_kernel(
    ids_ptr, probs_ptr, starts_ptr, logits_ptr, temperature_ptr, seeds_ptr, positions_ptr, normalizer_ptr,
    accepted_ptr, requests, row_stride, probs_stride, V, CERTAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write whether a draft token is accepted by itself, and its row's log of the sum of exponentials."""
    draft = tl.program_id(0)
    low, high = 0, requests  # the last request that starts at or before this draft token
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts_ptr + middle) <= draft:
            low = middle
        else:
            high = middle
    place = draft - tl.load(starts_ptr + low)
    row_ptr = logits_ptr + (draft + low).to(tl.int64) * row_stride
    temperature = tl.load(temperature_ptr + low)
    hot = tl.where(temperature > 0, temperature, 1.0)
    greatest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    first = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        token = start + tl.arange(0, BLOCK)  # [BLOCK]
        logit = tl.load(row_ptr + token, mask=token < V, other=float("-inf")).to(tl.float32)
        now = tl.maximum(greatest, logit)
        safe = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp((greatest - safe) / hot) + tl.exp((logit - safe) / hot)
        first = tl.where(logit > greatest, token, first)
        greatest = now
    top = tl.max(greatest, 0)
    normalizer = top / hot + tl.log(tl.sum(total * tl.exp((greatest - top) / hot), 0))
    drafted = tl.load(ids_ptr + draft)
    if temperature > 0:
        q = tl.full([], 1.0, tl.float32)
        if not CERTAIN:
            q = tl.load(probs_ptr + draft.to(tl.int64) * probs_stride + drafted)
        p = tl.exp(tl.load(row_ptr + drafted).to(tl.float32) / hot - normalizer)
        key = draw_key(tl.load(seeds_ptr + low), tl.load(positions_ptr + low) + place, ACCEPT)
        accepted = uniform(key, drafted * 0) * q < p
    else:
        accepted = tl.min(tl.where(greatest == top, first, V), 0) == drafted
    tl.store(accepted_ptr + draft, accepted.to(tl.int32))
    tl.store(normalizer_ptr + draft, normalizer)


@triton.jit
def _finish_kernel(
    ids_ptr, probs_ptr, starts_ptr, logits_ptr, temperature_ptr, seeds_ptr, positions_ptr, normalizer_ptr,
    accepted_ptr, tokens_ptr, counts_ptr, row_stride, probs_stride, V, CERTAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0).to(tl.int64)
    first, end = tl.load(starts_ptr + request), tl.load(starts_ptr + request + 1)
    draft = first
    more = first < end
    while more:
        more = tl.load(accepted_ptr + draft) != 0
        if more:
            tl.store(tokens_ptr + draft + request, tl.load(ids_ptr + draft))
            draft += 1
            more = draft < end
    tl.store(counts_ptr + request, draft - first + 1)
    for behind in range(draft + request + 1, end + request + 1):
        tl.store(tokens_ptr + behind, tl.full([], -1, tl.int64))
    replaced = draft < end
    temperature = tl.load(temperature_ptr + request)
    seed, position = tl.load(seeds_ptr + request), tl.load(positions_ptr + request) + draft - first
    key = tl.where(replaced, draw_key(seed, position, RECOVER), draw_key(seed, position, DRAW))
    normalizer = tl.load(normalizer_ptr + draft, mask=replaced, other=0.0)
    drafted = tl.load(ids_ptr + draft, mask=replaced, other=0)
    # The best of the residual, and of the target: rounding can reject where no residual is left, p = q.
    rest_best = tl.full([BLOCK], float("-inf"), tl.float32)
    rest_token = tl.zeros([BLOCK], tl.int32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_token = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        token = start + tl.arange(0, BLOCK)  # [BLOCK]
        inside = token < V
        logit = tl.load(logits_ptr + (draft + request) * row_stride + token, mask=inside, other=float("-inf"))
        score = logit.to(tl.float32)
        if temperature > 0:
            score = tl.math.div_rn(score, tl.zeros_like(score) + temperature)
            noise = gumbel(key, token)
            if replaced:
                if CERTAIN:
                    rest = tl.where(token == drafted, 0.0, tl.exp(score - normalizer))
                else:
                    q = tl.load(probs_ptr + draft * probs_stride + token, mask=inside, other=0.0)
                    rest = tl.maximum(tl.exp(score - normalizer) - q, 0.0)
                rest_score = tl.where(rest > 0, tl.log(rest) + noise, float("-inf"))
                rest_token = tl.where(rest_score > rest_best, token, rest_token)
                rest_best = tl.maximum(rest_best, rest_score)
            score += noise
        best_token = tl.where(score > best, token, best_token)
        best = tl.maximum(best, score)
    if tl.max(rest_best, 0) > float("-inf"):
        best, best_token = rest_best, rest_token
    chosen = tl.min(tl.where(best == tl.max(best, 0), best_token, V), 0)
    tl.store(tokens_ptr + draft + request, chosen.to(tl.int64))


def config(V: int) -> dict[str, int]:
    """Launch configuration. Unmeasured: a row is a program, each thread keeps the best of its columns."""
    block = min(triton.next_power_of_2(V), 4096)
    return {"BLOCK": block, "num_warps": max(block // 256, 1)}


_TYPES = dict.fromkeys(("ids_ptr", "starts_ptr", "seeds_ptr", "positions_ptr", "tokens_ptr", "counts_ptr"), "*i64")
_TYPES |= dict.fromkeys(("probs_ptr", "temperature_ptr", "normalizer_ptr"), "*fp32") | {"accepted_ptr": "*i32"}
speculative_reject.builds(
    Build(kernel, {"CERTAIN": certain, **config(151936)}, _TYPES)
    for certain in (False, True) for kernel in (_accept_kernel, _finish_kernel)
)  # fmt: skip


@speculative_reject.provider("triton", devices=("cuda",), triton=True)
def speculative_reject_triton(
    draft_ids_N: Tensor, draft_probs_NV: Tensor | None, starts_R1: Tensor, logits_MV: Tensor, temperature_R: Tensor,
    seeds_R: Tensor, positions_R: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    drafts, requests, vocab, device = len(draft_ids_N), len(seeds_R), logits_MV.shape[1], logits_MV.device
    tokens_M = torch.empty(drafts + requests, dtype=torch.int64, device=device)
    counts_R = torch.empty(requests, dtype=torch.int64, device=device)
    normalizer_N = torch.empty(drafts, dtype=torch.float32, device=device)
    accepted_N = torch.empty(drafts, dtype=torch.int32, device=device)
    strides = logits_MV.stride(0), 0 if draft_probs_NV is None else draft_probs_NV.stride(0)
    given = (
        draft_ids_N, draft_probs_NV, starts_R1, logits_MV, temperature_R, seeds_R, positions_R, normalizer_N, accepted_N
    )  # fmt: skip
    chosen = {"CERTAIN": draft_probs_NV is None, **config(vocab)}
    if drafts:
        _accept_kernel[(drafts,)](*given, requests, *strides, vocab, **chosen)
    if requests:
        _finish_kernel[(requests,)](*given, tokens_M, counts_R, *strides, vocab, **chosen)
    return tokens_M, counts_R
