"""Log probabilities of sampled and of prompt tokens, as outputs carry them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from seamwise.kernels import logprobs

from .logprob import Logprob
from .params import SamplingParams

Found = dict[int, Logprob]

MODES = ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")


def check_mode(mode: str) -> str:
    """Return the mode. Raises ValueError for one that is none of MODES."""
    if mode not in MODES:
        raise ValueError(f"logprobs_mode={mode!r}: wanted one of {', '.join(MODES)}")
    return mode


def report(values_LV: Tensor, tokens_L: Tensor, wanted: Sequence[SamplingParams], mode: str) -> list[Found]:
    """Return each row's token and its most likely tokens, or those asked for by id, with values and ranks.

    values_LV are raw logits or, in the modes called processed, those that were drawn from (divided by temperature).
    """
    vocab = values_LV.shape[1]
    counts = [0 if p.logprob_token_ids is not None else _count(p.logprobs, vocab) for p in wanted]
    found = top_logprobs(values_LV, tokens_L, counts, mode)
    for r, p in enumerate(wanted):
        if p.logprob_token_ids is not None:
            ids = torch.tensor(list(p.logprob_token_ids), device=values_LV.device)
            one_KV = values_LV[r : r + 1].expand(len(ids), -1)
            own, ranks, _, _ = logprobs(one_KV, ids, 0)
            if mode.endswith("logits"):
                own = one_KV[0, ids].float()
            for token, value, rank in zip(ids.tolist(), own.tolist(), ranks.tolist(), strict=True):
                found[r].setdefault(token, Logprob(value, rank))
    return found


def top_logprobs(values_LV: Tensor, tokens_L: Tensor, counts: Sequence[int], mode: str) -> list[Found]:
    """Return each row's token and its counts[r] most likely ones with their values and ranks."""
    deepest = max(counts, default=0)
    own, ranks, top, ids = logprobs(values_LV, tokens_L, deepest)
    if mode.endswith("logits"):
        own = values_LV.gather(1, tokens_L.unsqueeze(1)).squeeze(1).float()
        top = values_LV.gather(1, ids).float()
    found = []
    columns = (tokens_L.tolist(), own.tolist(), ranks.tolist(), top.tolist(), ids.tolist(), counts)
    for token, value, rank, values, tokens, count in zip(*columns, strict=True):
        row = {token: Logprob(value, rank)}
        for place, (one, its) in enumerate(zip(tokens[:count], values, strict=False), start=1):
            row.setdefault(one, Logprob(its, place))
        found.append(row)
    return found


def prompt_logprobs(logits_LV: Tensor, following: np.ndarray, count: int, mode: str) -> list[Found]:
    """Return what report does for a prompt's tokens: row r's logits precede token following[r]."""
    tokens_L = torch.from_numpy(following.astype(np.int64)).to(logits_LV.device)
    return top_logprobs(logits_LV, tokens_L, [_count(count, logits_LV.shape[1])] * len(following), mode)


def _count(wanted: int | None, vocab: int) -> int:
    return 0 if wanted is None else vocab if wanted == -1 else min(wanted, vocab)
