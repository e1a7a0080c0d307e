"""The attention of transformers' classes, through the contracts: every call of it has its own paged cache.

It comes through transformers' AttentionInterface, as scaled_dot_product_attention, or spelled out (hf_scores.py). Which
keys a query sees is in the mask that transformers is asked for: here that is not a tensor, but what it means.
Source: AttentionInterface, https://huggingface.co/docs/transformers/attention_interface.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import is_contiguous_or_false
from torch.overrides import TorchFunctionMode

from seamwise.kernels import attention, kv_append

from .hf_masks import ADDED, VISIBLE, Mask, mask_of
from .hf_scores import PRODUCTS, SUMMED_PRODUCTS, Scores, is_square

IMPLEMENTATION = "seamwise"
# Keyword arguments that attention functions are given and that leave causal attention as it is. Any other one that is
# set (position_bias, …) would change the result: it is refused, not ignored.
_HARMLESS = {
    "position_ids", "position_embeddings", "use_cache", "output_attentions", "output_hidden_states",
    "output_router_logits",
}  # fmt: skip


EVERY_KEY = object()  # what an indexer chooses that may choose as many as there are


@dataclass(slots=True, kw_only=True)
class Step:
    """A step's tensors, handed through the model's own code to its attention.

    kv_caches  of each call of attention in order; None: calls are only counted, and their shapes kept
    longest    most tokens of a request
    tokens     rows of the step
    own        the model's own code computes attention, not transformers' interface
    called     heads and width of each call's cache
    filled     what the model's own code filled with a number, and with which
    """

    kv_caches: Sequence[Sequence[Tensor]] | None
    slot_mapping: Tensor
    spans: tuple[Tensor, Tensor, Tensor]
    longest: int
    tokens: Any
    own: bool = False
    called: list[tuple[int, int]] = field(default_factory=list)
    filled: list[tuple[Tensor, float]] = field(default_factory=list)

    def value_of(self, tensor: Any) -> float | None:
        """Return what a tensor was filled with; None where that is not known."""
        return next((value for one, value in self.filled if one is tensor), None)


_STEP: ContextVar[Step | None] = ContextVar("seamwise_step", default=None)


def register() -> None:
    """Make transformers know the implementation."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, partial(make_mask, VISIBLE))


class Attending(TorchFunctionMode):
    """A context in which attention of this thread's calls of a model goes to a step's caches."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self._step = step

    def __enter__(self) -> Attending:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks

        self._token, self._masks = _STEP.set(self._step), {name: masks[name] for name in ("sdpa", "eager")}
        masks["sdpa"] = self._in_step(partial(make_mask, VISIBLE), masks["sdpa"])
        masks["eager"] = self._in_step(partial(make_mask, ADDED), masks["eager"])
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks

        super().__exit__(*raised)
        for name, function in self._masks.items():
            masks[name] = function
        _STEP.reset(self._token)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _dot_product(*args, **kwargs)
        if func in PRODUCTS and is_square(args[0], args[1], self._step.tokens):
            return _scores(args[0], args[1], self._step)
        if (
            func in SUMMED_PRODUCTS
            and self._step.value_of(args[0]) == 0
            and is_square(args[1], args[2], self._step.tokens)
        ):
            return _scores(args[1], args[2], self._step) * kwargs.get("alpha", 1)
        if func is torch.where and isinstance(args[0], Mask) and isinstance(args[1], Tensor):
            args[0].check_added(self._step.value_of(args[1]), args[2])
            return replace(args[0], says=ADDED)
        if func in _ORDERED and self._step.own and not is_contiguous_or_false(args[0]):
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])  # else it asks how many tokens
        result = func(*args, **kwargs)
        if func is torch.full:
            self._step.filled.append((result, args[1]))
        elif func in _FILLS:
            self._step.filled.append((result, _FILLS[func]))
        elif func in _KEEPS and (value := self._step.value_of(args[0])) is not None:
            self._step.filled.append((result, value))
        return result

    def _in_step(self, ours: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
        return lambda **options: ours(**options) if _STEP.get() is self._step else plain(**options)


_FILLS = {torch.ones: 1, torch.ones_like: 1, Tensor.new_ones: 1, torch.zeros: 0, torch.zeros_like: 0}
_ORDERED = {Tensor.reshape, Tensor.view, Tensor.contiguous}  # what may need its argument's elements in a row
_KEEPS = {Tensor.to, Tensor.bool}


def make_mask(
    says: str = VISIBLE, *, mask_function: Callable[..., Any], attention_mask: Any = None, **others: Any
) -> Mask:
    """Mask function for transformers: read what is asked for from the functions that it is put together of."""
    step = _STEP.get()
    if step is None:
        raise ValueError(f"attn_implementation={IMPLEMENTATION!r} needs a step; call the model through seamwise")
    if attention_mask is not None and step.value_of(attention_mask) != 1:  # one of ones, which a model makes, is none
        raise ValueError(f"a mask of {type(attention_mask).__name__} is not served; wanted plain causal attention")
    return replace(mask_of(mask_function, step.longest), says=says, tokens=step.tokens, device=step.slot_mapping.device)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Mask | Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention function for transformers: query (1, H, T, E), key (1, K, T, E), value (1, K, T, V) -> (1, T, H, V)."""
    name = type(module).__name__
    step = _STEP.get()
    if step is None:
        raise ValueError(f"{name}: attn_implementation={IMPLEMENTATION!r} needs a step; call it through seamwise")
    changing = {k: v for k, v in others.items() if v is not EVERY_KEY and k not in _HARMLESS}
    refused = {k: v for k, v in changing.items() if v is not None and v is not False}
    if not (attention_mask is None or isinstance(attention_mask, Mask)):
        refused["attention_mask"] = attention_mask
    refused |= {"dropout": dropout} if dropout else {}
    refused |= {"is_causal": False} if is_causal is False or not getattr(module, "is_causal", True) else {}
    if refused:
        plain = (int, float, str)
        shown = ", ".join(f"{k}={v if isinstance(v, plain) else type(v).__name__}" for k, v in refused.items())
        raise ValueError(f"{name}: {shown} is not served; wanted plain causal attention")
    window = sliding_window or 0
    if isinstance(attention_mask, Mask):
        if sliding_window is not None and window != attention_mask.window:
            raise ValueError(
                f"{name}: call {len(step.called)} of attention has sliding_window={sliding_window}, its mask"
                f" {attention_mask.window or 'none'}"
            )
        window = attention_mask.applied()
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    return _attend(name, step, query, key, value, scale, window, softcap or 0.0, s_aux).unsqueeze(0), None


def _dot_product(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """scaled_dot_product_attention of a model's own code: query (1, H, T, E) -> (1, H, T, V)."""
    if isinstance(attn_mask, Tensor) or dropout_p:
        raise ValueError("scaled_dot_product_attention with a mask of its own, or dropout, is not served")
    step = _STEP.get()
    assert step is not None
    window, slopes_H = 0, None
    if isinstance(attn_mask, Mask):
        window, slopes_H = replace(attn_mask, slopes_H=None).applied(), attn_mask.slopes_H
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    name = "scaled_dot_product_attention"
    return _attend(name, step, query, key, value, scale, window, 0.0, None, slopes_H).transpose(0, 1).unsqueeze(0)


def _scores(queries: Tensor, keys: Tensor, step: Step) -> Scores:
    """Return the scores of attention that a model spells out, of queries (…, H, T, E) and keys (…, K, E, T)."""

    def attend_by(scores: Scores, values: Tensor) -> Tensor:
        query, key, value = (
            x if x.dim() == 4 else x.unsqueeze(0) for x in (scores.queries, scores.keys.transpose(-1, -2), values)
        )
        query, key = query.to(value.dtype), key.to(value.dtype)  # which some widen before they are multiplied
        window = scores.mask.window if scores.mask is not None else 0
        out_HTV = _attend(
            "spelled out", step, query, key, value, scores.scale, window, 0.0, None, scores.slopes_H
        ).transpose(0, 1)
        return out_HTV.unsqueeze(0) if values.dim() == 4 else out_HTV

    shape = torch.Size((*queries.shape[:-1], step.tokens))
    return Scores(queries=queries, keys=keys, attend=attend_by, shape=shape, dtype=queries.dtype)


def _attend(
    name: str, step: Step, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, softcap: float,
    sinks: Tensor | None, slopes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Append keys and values to the call's cache and attend: (T, H, V)."""
    width, at = value.shape[3], len(step.called)
    if width > key.shape[3]:
        raise ValueError(f"{name}: values of width {width}, keys of {key.shape[3]}; wanted values no wider")
    step.called.append((key.shape[1], key.shape[3]))
    q_THE, k_TKE, v_TKV = (x[0].transpose(0, 1) for x in (query, key, value))
    if step.kv_caches is None:
        return q_THE.new_zeros(q_THE.shape[0], q_THE.shape[1], width)
    if width < key.shape[3]:  # the caches are alike; expanded latents have narrower values
        v_TKV = F.pad(v_TKV, (0, key.shape[3] - width))
    if at >= len(step.kv_caches):
        raise ValueError(f"{name}: attention is called {at + 1} times, there are {len(step.kv_caches)} KV caches")
    k_cache, v_cache = step.kv_caches[at]
    for what, x, cache in (("key", k_TKE, k_cache), ("value", v_TKV, v_cache)):
        if (x.shape[1], x.shape[2]) != (cache.shape[1], cache.shape[3]):
            raise ValueError(
                f"{name}: call {at}'s {what} has {x.shape[1]} heads of width {x.shape[2]}, the KV cache"
                f" {cache.shape[1]} of {cache.shape[3]}"
            )
    kv_append(k_TKE, v_TKV, k_cache, v_cache, step.slot_mapping)
    return attention(q_THE, k_cache, v_cache, *step.spans, scale, window, softcap, sinks, slopes)[..., :width]
