"""From logits to tokens: the rows' options as the arguments of the sampling contracts, and their results back.

    raw logits ─► edit.py (mask, bias, min_tokens, penalties, bad words, processors) ─► temperature ─► min_p ─► top_k
               ─► top_p ─► draw by (seed, position)

Every row is treated by itself, with operations whose result does not depend on the other rows, so a seeded request
samples the same tokens whatever it is batched with.
Source: the order is vLLM's, https://docs.vllm.ai/en/latest/api/vllm/v1/sample/sampler.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from seamwise.kernels import gumbel_sample, truncate_logits

from .edit_logits import edit_logits
from .report import Found, report
from .rows import SamplingRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """tokens (L,) int64; log probabilities of rows that want them; what rows raised that have no token."""

    tokens: np.ndarray
    logprobs: dict[int, Found]
    failed: dict[int, Exception]


def sample(logits_LV: Tensor, rows: SamplingRows, mode: str = "raw_logprobs") -> Sampled:
    """Choose the next token of each row of logits (any float dtype). `mode` says what log probabilities are of."""
    device = logits_LV.device
    failed: dict[int, Exception] = {}
    adjusted_LV = logits_LV
    if rows.special.any():
        adjusted_LV, failed = edit_logits(logits_LV, rows)
    temperature_L = _column(rows.temperature, device)
    drawn = rows.temperature > 0
    if drawn.any() and ((rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0)).any():
        top_k = np.minimum(rows.top_k, logits_LV.shape[1])
        cuts = (_column(column, device) for column in (top_k, rows.top_p, rows.min_p))
        adjusted_LV = truncate_logits(adjusted_LV, temperature_L, *cuts)
    tokens_L = gumbel_sample(
        adjusted_LV, temperature_L, _column(rows.seeds, device), _column(rows.positions.astype(np.int64), device)
    )
    _refuse_impossible(adjusted_LV, tokens_L, failed)
    found: dict[int, Found] = {}
    if rows.wants.any():
        wanting = rows.wants.nonzero()[0]
        values_LV = logits_LV[wanting]
        if mode.startswith("processed"):
            hot = np.where(drawn, rows.temperature, 1.0).astype(np.float32)[wanting]
            values_LV = adjusted_LV[wanting].float() / _column(hot, device).unsqueeze(1)
        params = [rows.options[r].params for r in wanting.tolist()]
        reports = report(values_LV, tokens_L[wanting], params, mode)
        found = dict(zip(wanting.tolist(), reports, strict=True))
    return Sampled(tokens=tokens_L.cpu().numpy(), logprobs=found, failed=failed)


def _refuse_impossible(logits_LV: Tensor, tokens_L: Tensor, failed: dict[int, Exception]) -> None:
    """Let rows fail whose greatest logit is -inf, which every token then has, or NaN: any token would be a lie."""
    chosen = logits_LV.gather(1, tokens_L.unsqueeze(1)).squeeze(1).float().cpu().numpy()
    for r in (~(chosen > -np.inf)).nonzero()[0].tolist():
        nothing = ValueError("no token is allowed next: what is allowed, and what is forbidden, leave none")
        broken = RuntimeError("the logits are NaN: a weight is, or a value is too large for the model's dtype")
        failed.setdefault(r, broken if np.isnan(chosen[r]) else nothing)


def _column(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)
