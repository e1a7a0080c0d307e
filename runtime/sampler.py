"""From logits to tokens: bias, penalties, temperature, truncation, a stateless draw; and log probabilities.

Every row is treated by itself, with operations whose result does not depend on the other rows, so a seeded request
samples the same tokens whatever it is batched with.
Source: the order is vLLM's, https://docs.vllm.ai/en/latest/api/vllm/v1/sample/sampler; the draw is the Gumbel-max
trick, Maddison et al. 2014, https://arxiv.org/abs/1411.0030.
"""

from __future__ import annotations

from collections.abc import Sequence as Series
from dataclasses import dataclass

import torch
from torch import Tensor

from .noise import draw_key, gumbel_noise
from .outputs import Logprob
from .request import Sequence
from .truncate import truncate


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One token for each row, and its log probabilities where asked for."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob] | None]


def sample(logits_LV: Tensor, sequences: Series[Sequence]) -> Sampled:
    """Choose the next token of each sequence from its row of logits (any float dtype).

    Log probabilities are of the raw logits. The rest in order: min_tokens, bias; repetition, frequency and presence
    penalty; temperature; min_p; top_k; top_p; draw.
    """
    if all(s.plain for s in sequences):
        return Sampled(tokens=argmax(logits_LV), logprobs=[None] * len(sequences))
    edited = [r for r, s in enumerate(sequences) if _edits(s)]
    adjusted_LV = logits_LV.float()
    if edited and adjusted_LV is logits_LV:
        adjusted_LV = logits_LV.clone()
    for r in edited:
        _edit_row(adjusted_LV[r], sequences[r])
    drawn = [r for r, s in enumerate(sequences) if not s.params.greedy]
    tokens = argmax(adjusted_LV) if len(drawn) < len(sequences) else [0] * len(sequences)
    if drawn:
        rows_LV = adjusted_LV if len(drawn) == len(sequences) else adjusted_LV[drawn]
        for r, token in zip(drawn, _draw(rows_LV, [sequences[r] for r in drawn]), strict=True):
            tokens[r] = token
    return Sampled(tokens=tokens, logprobs=_logprobs(logits_LV, tokens, [s.params.logprobs for s in sequences]))


def argmax(logits_LV: Tensor) -> list[int]:
    """Return each row's greatest column, the first of equals."""
    if logits_LV.device.type == "cpu":
        # numpy's is vectorized: 0.17 ms against torch's 2.8 ms for 32 x 49,152 in bf16, 0.10 against 0.74 in fp32.
        return logits_LV.float().numpy().argmax(-1).tolist()
    return logits_LV.argmax(-1).tolist()


def _edits(s: Sequence) -> bool:
    return s.params.has_penalties or bool(s.params.logit_bias) or s.num_tokens - s.num_prompt < s.params.min_tokens


def _edit_row(logits_V: Tensor, sequence: Sequence) -> None:
    """Apply min_tokens, bias and penalties to one row in place."""
    p, device = sequence.params, logits_V.device
    if sequence.num_tokens - sequence.num_prompt < p.min_tokens:
        logits_V[[*sequence.stop_ids, *p.stop_tokens]] = float("-inf")
    for token, bias in p.biases.items():
        logits_V[token] += bias
    # An id that occurs twice is read before it is written, and written the same value twice.
    if p.repetition_penalty != 1:
        known = torch.from_numpy(sequence.tokens[: sequence.num_tokens]).to(device)
        seen = logits_V[known]
        logits_V[known] = torch.where(seen > 0, seen / p.repetition_penalty, seen * p.repetition_penalty)
    output = torch.from_numpy(sequence.tokens[sequence.num_prompt : sequence.num_tokens]).to(device)
    if p.frequency_penalty:
        logits_V.index_add_(0, output, torch.full_like(output, -p.frequency_penalty, dtype=logits_V.dtype))
    if p.presence_penalty:
        logits_V[output] = logits_V[output] - p.presence_penalty


def _draw(logits_LV: Tensor, sequences: Series[Sequence]) -> list[int]:
    """Draw one token a row from the truncated distribution at each row's temperature."""
    params, device = [s.params for s in sequences], logits_LV.device
    temperature = torch.tensor([p.temperature for p in params], device=device, dtype=torch.float32)
    kept_LV = truncate(
        logits_LV / temperature.unsqueeze(-1),
        top_k=[p.top_k for p in params],
        top_p=[p.top_p for p in params],
        min_p=[p.min_p for p in params],
    )
    noise_LV = gumbel_noise([draw_key(s.seed, s.num_tokens) for s in sequences], logits_LV.shape[1], device)
    return argmax(noise_LV.add_(kept_LV))


def _logprobs(logits_LV: Tensor, tokens: Series[int], wanted: Series[int | None]) -> list[dict[int, Logprob] | None]:
    """Return for each row that wants them its token's and its most likely tokens' log probabilities, with ranks."""
    found: list[dict[int, Logprob] | None] = [None] * len(tokens)
    rows = [r for r, count in enumerate(wanted) if count is not None]
    if not rows:
        return found
    logprobs_LV = logits_LV[rows].float().log_softmax(-1)
    chosen = torch.tensor([tokens[r] for r in rows], device=logits_LV.device).unsqueeze(-1)
    own_L1 = logprobs_LV.gather(1, chosen)
    ranks = (1 + (logprobs_LV > own_L1).sum(-1)).tolist()
    deepest = min(max(count or 0 for count in wanted), logits_LV.shape[1])
    values, indices = (t.tolist() for t in logprobs_LV.topk(deepest, dim=-1))
    for i, (r, own) in enumerate(zip(rows, own_L1.squeeze(-1).tolist(), strict=True)):
        row = {tokens[r]: Logprob(own, ranks[i])}
        for rank, (token, value) in enumerate(zip(indices[i][: wanted[r]], values[i], strict=False), start=1):
            row.setdefault(token, Logprob(value, rank))
        found[r] = row
    return found
