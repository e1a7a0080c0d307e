"""Let a model's forward return the hidden states that its logits are computed from: beside them, or in their place."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

_HEAD = "lm_head"
Value = TypeVar("Value")


def return_hidden_states(model: nn.Module, *, alone: bool = False) -> None:
    """Make `model.forward` return (logits (L, V), hidden states (L, D)): what its head, `lm_head`, is given.

    alone  return the hidden states alone; the head is then no part of what is traced

    It is to be traced afterwards. Raises ValueError for a model without a module of that name.
    """
    head = getattr(model, _HEAD, None)
    if not isinstance(head, nn.Module):
        asked = "runner='pooling'" if alone else "return_hidden_states"
        raise ValueError(f"{asked}: {type(model).__name__} has no module {_HEAD}, whose inputs they are; leave it out")
    seen: list[Tensor] = []
    head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    forward = model.forward

    @functools.wraps(forward)
    def with_states(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
        logits_LV = forward(*args, **kwargs)
        hidden = seen.pop()
        hidden = hidden.reshape(-1, hidden.shape[-1])  # transformers' have a batch of one before them
        if not getattr(model, "keeps_logits", True):  # a class that computes logits of every token
            hidden = hidden[kwargs.get("logit_rows", args[-1] if args else None)]
        return hidden if alone else (logits_LV, hidden)

    model.forward = with_states


def without_head(named: Mapping[str, Value]) -> dict[str, Value]:
    """Return what is named so without that of the head."""
    return {name: value for name, value in named.items() if not name.startswith(f"{_HEAD}.")}
