"""From logits to tokens: penalties, log probabilities, temperature, truncation, and a stateless draw.

The draw is the Gumbel-max trick with noise that depends on (seed, position, token id) only, so a seeded request
samples the same tokens whatever it is batched with. Noise: the splitmix64 finalizer of a counter.
Source: Steele, Lea and Flood 2014, https://doi.org/10.1145/2660193.2660195 (splitmix64); Maddison et al. 2014,
https://arxiv.org/abs/1411.0030 (Gumbel-max).
"""

from __future__ import annotations

from collections.abc import Sequence as Series
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .outputs import Logprob
from .request import Sequence

_INT64 = 1 << 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One token for each row, and its log probabilities where asked for."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob] | None]


def sample(logits_LV: Tensor, sequences: Series[Sequence]) -> Sampled:
    """Choose the next token of each sequence from its row of logits (any float dtype).

    Order, as in vLLM: log probabilities of the raw logits; penalties and bias; temperature; min_p; top_k and top_p.
    """
    params = [s.params for s in sequences]
    wanted = [p.logprobs for p in params]
    plain = all(p.greedy and not p.has_penalties and not p.logit_bias for p in params)
    blocked = [_blocked_until_min_tokens(s) for s in sequences]
    if plain and not any(blocked):
        tokens = logits_LV.argmax(-1).tolist()
    else:
        adjusted = _adjust(logits_LV.float(), sequences, blocked)
        tokens = _choose(adjusted, sequences)
    logprobs: list[dict[int, Logprob] | None] = [None] * len(tokens)
    if any(w is not None for w in wanted):
        for row, count in enumerate(wanted):
            if count is not None:
                logprobs[row] = _logprobs(logits_LV[row].float(), tokens[row], count)
    return Sampled(tokens=tokens, logprobs=logprobs)


def _blocked_until_min_tokens(sequence: Sequence) -> tuple[int, ...]:
    """Return ids that would end the output too early."""
    early = sequence.num_tokens - sequence.num_prompt < sequence.params.min_tokens
    return (*sequence.stop_ids, *sequence.params.stop_token_ids) if early else ()


def _adjust(logits_LV: Tensor, sequences: Series[Sequence], blocked: Series[tuple[int, ...]]) -> Tensor:
    adjusted = logits_LV.clone()
    for row, (sequence, ids) in enumerate(zip(sequences, blocked, strict=True)):
        p, logits_V = sequence.params, adjusted[row]
        if p.has_penalties:
            known = torch.from_numpy(np.unique(sequence.tokens[: sequence.num_tokens])).to(logits_V.device)
            seen = logits_V[known]
            logits_V[known] = torch.where(seen > 0, seen / p.repetition_penalty, seen * p.repetition_penalty)
            ids_out, counts = np.unique(sequence.tokens[sequence.num_prompt : sequence.num_tokens], return_counts=True)
            output = torch.from_numpy(ids_out).to(logits_V.device)
            count = torch.from_numpy(counts).to(logits_V)
            logits_V[output] -= p.frequency_penalty * count + p.presence_penalty
        for token, bias in p.logit_bias.items():
            logits_V[token] += bias
        if ids:
            logits_V[list(ids)] = float("-inf")
    return adjusted


def _choose(logits_LV: Tensor, sequences: Series[Sequence]) -> list[int]:
    params = [s.params for s in sequences]
    greedy_L = logits_LV.argmax(-1)
    if all(p.greedy for p in params):
        return greedy_L.tolist()  # type: ignore[no-any-return]
    device = logits_LV.device
    column = lambda values: torch.tensor(values, device=device, dtype=torch.float32).unsqueeze(-1)  # noqa: E731
    scaled_LV = logits_LV / column([1.0 if p.greedy else p.temperature for p in params])
    scaled_LV = truncate(
        scaled_LV,
        top_k=[p.top_k for p in params],
        top_p=[p.top_p for p in params],
        min_p=[p.min_p for p in params],
    )
    noise_LV = gumbel_noise([s.seed for s in sequences], [s.num_tokens for s in sequences], logits_LV.shape[1], device)
    drawn_L = (scaled_LV + noise_LV).argmax(-1)
    is_greedy = torch.tensor([p.greedy for p in params], device=device)
    return torch.where(is_greedy, greedy_L, drawn_L).tolist()  # type: ignore[no-any-return]


def truncate(logits_LV: Tensor, *, top_k: Series[int], top_p: Series[float], min_p: Series[float]) -> Tensor:
    """Set logits outside min_p, top_k and top_p to -inf, row by row; 0 or -1, 1.0 and 0.0 switch each off.

    top_p keeps the smallest set of most likely tokens whose probability reaches it, among those top_k kept; at least
    one token always stays.
    """
    device, vocab = logits_LV.device, logits_LV.shape[1]
    if any(min_p):
        floor = torch.tensor(min_p, device=device).unsqueeze(-1).log() + logits_LV.amax(-1, keepdim=True)
        logits_LV = logits_LV.masked_fill(logits_LV < floor, float("-inf"))
    ks = [k if 0 < k < vocab else vocab for k in top_k]
    if all(k == vocab for k in ks) and all(p == 1.0 for p in top_p):
        return logits_LV
    # Without top_p only the k-th value matters, and a partial sort is enough.
    depth = vocab if any(p < 1.0 for p in top_p) else max(k for k in ks if k < vocab)
    values, indices = (
        logits_LV.topk(depth, dim=-1) if depth < vocab else logits_LV.sort(-1, descending=True, stable=True)
    )
    if depth < vocab:
        kth = values.gather(1, torch.tensor([min(k, depth) - 1 for k in ks], device=device).unsqueeze(-1))
        kth = torch.where(torch.tensor([k == vocab for k in ks], device=device).unsqueeze(-1), float("-inf"), kth)
        return logits_LV.masked_fill(logits_LV < kth, float("-inf"))
    rank = torch.arange(vocab, device=device)
    values = values.masked_fill(rank >= torch.tensor(ks, device=device).unsqueeze(-1), float("-inf"))
    probs = values.softmax(-1)
    before = probs.cumsum(-1) - probs
    drop = before >= torch.tensor(top_p, device=device, dtype=probs.dtype).unsqueeze(-1)
    drop[:, 0] = False
    off = torch.tensor([p == 1.0 for p in top_p], device=device).unsqueeze(-1)
    values = values.masked_fill(drop & ~off, float("-inf"))
    return torch.empty_like(logits_LV).scatter_(1, indices, values)


def gumbel_noise(seeds: Series[int], positions: Series[int], vocab_size: int, device: torch.device) -> Tensor:
    """Return (L, vocab_size) float32 Gumbel(0, 1) noise, a pure function of each row's seed and position."""
    rows = torch.tensor(
        [_signed(s * 0x9E3779B97F4A7C15 + p * 0xD1342543DE82EF95) for s, p in zip(seeds, positions, strict=True)]
    )
    counter = rows.to(device).unsqueeze(-1) + torch.arange(vocab_size, device=device) * _signed(0x9E3779B97F4A7C15)
    bits = _mix(_mix(counter))
    uniform = ((bits >> 11) & ((1 << 53) - 1)).double().add_(0.5).mul_(2.0**-53)
    return uniform.log_().neg_().log_().neg_().float()


def _mix(z: Tensor) -> Tensor:
    """The splitmix64 finalizer on int64 (multiplications wrap; shifts are logical)."""
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, n: int) -> Tensor:
    return (z >> n) & ((1 << (64 - n)) - 1)


def _signed(x: int) -> int:
    x %= _INT64
    return x - _INT64 if x >= _INT64 // 2 else x


def _logprobs(logits_V: Tensor, token: int, count: int) -> dict[int, Logprob]:
    """Return the sampled token's and the `count` most likely tokens' log probabilities with their ranks."""
    logprobs_V = logits_V.log_softmax(-1)
    own = float(logprobs_V[token])
    found = {token: Logprob(own, 1 + int((logprobs_V > own).sum()))}
    values, indices = logprobs_V.topk(min(count, logprobs_V.numel()))
    for rank, (value, index) in enumerate(zip(values.tolist(), indices.tolist(), strict=True), start=1):
        found.setdefault(index, Logprob(value, rank))
    return found
