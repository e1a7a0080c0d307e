"""Let a model's forward return, beside the logits, the hidden states that they are computed from."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn


def return_hidden_states(model: nn.Module) -> None:
    """Make `model.forward` return (logits (L, V), hidden states (L, D)): what its head, `lm_head`, is given.

    It is to be traced afterwards. Raises ValueError for a model without a module of that name.
    """
    head = getattr(model, "lm_head", None)
    if not isinstance(head, nn.Module):
        raise ValueError(
            f"return_hidden_states: {type(model).__name__} has no module lm_head, whose inputs they are; leave it out"
        )
    seen: list[Tensor] = []
    head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    forward = model.forward

    @functools.wraps(forward)
    def both(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        logits_LV = forward(*args, **kwargs)
        hidden = seen.pop()
        return logits_LV, hidden.reshape(-1, hidden.shape[-1])  # transformers' have a batch of one before them

    model.forward = both
