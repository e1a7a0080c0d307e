"""The attention of transformers' classes, through the contracts: every call of it has its own paged cache.

It comes through transformers' AttentionInterface, or as scaled_dot_product_attention where a class calls that itself.
Which keys a query sees is in the mask that transformers is asked for: here that is not a tensor, but what it means.
Source: AttentionInterface, https://huggingface.co/docs/transformers/attention_interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from seamwise.kernels import attention, kv_append

IMPLEMENTATION = "seamwise"
# Keyword arguments that attention functions are given and that leave causal attention as it is. Any other one that is
# set (position_bias, …) would change the result: it is refused, not ignored.
_HARMLESS = {
    "position_ids", "position_embeddings", "use_cache", "output_attentions", "output_hidden_states",
    "output_router_logits",
}  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Step:
    """A step's tensors, handed through the model's own code to its attention.

    kv_caches  of each call of attention in order; None: calls are only counted, and their shapes kept
    longest    most tokens of a request
    called     heads and width of each call's cache
    """

    kv_caches: Sequence[Sequence[Tensor]] | None
    slot_mapping: Tensor
    spans: tuple[Tensor, Tensor, Tensor]
    longest: int
    called: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Mask:
    """What a causal mask lets a query see: the last `window` keys, 0 for all. As a value it may only be handed on."""

    window: int

    def __getitem__(self, item: Any) -> Mask:
        return self  # the part that belongs to these queries and keys

    def to(self, *args: Any, **options: Any) -> Mask:
        return self

    def __getattr__(self, name: str) -> Any:
        raise MaskUsedError(f"the model's own code reads its mask ({name}), which is not served; wanted it handed on")

    def __add__(self, other: Any) -> Any:
        raise MaskUsedError("the model's own code computes with its mask, which is not served; wanted it handed on")

    __radd__ = __mul__ = __rmul__ = __and__ = __rand__ = __or__ = __invert__ = __add__


class MaskUsedError(ValueError, AttributeError):
    """A model wants more of a mask than to hand it to attention; an AttributeError too, for `hasattr`."""


_STEP: ContextVar[Step | None] = ContextVar("seamwise_step", default=None)


def register() -> None:
    """Make transformers know the implementation."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, make_mask)


@contextmanager
def attending(step: Step) -> Iterator[None]:
    """Let attention of this thread's calls of a model go to the step's caches."""
    plain = F.scaled_dot_product_attention

    def dot_product(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        if _STEP.get() is not step:
            return plain(query, key, value, *args, **options)
        return _dot_product(query, key, value, *args, **options)

    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks

    plain_mask = masks["sdpa"]

    def mask(**options: Any) -> Any:
        return make_mask(**options) if _STEP.get() is step else plain_mask(**options)

    token = _STEP.set(step)
    F.scaled_dot_product_attention, masks["sdpa"] = dot_product, mask
    try:
        yield
    finally:
        F.scaled_dot_product_attention, masks["sdpa"] = plain, plain_mask
        _STEP.reset(token)


def make_mask(*, mask_function: Callable[..., Any], attention_mask: Any = None, **others: Any) -> Mask:
    """Mask function for transformers: read what is asked for from the functions that it is put together of."""
    if attention_mask is not None:
        raise ValueError(f"a mask of {type(attention_mask).__name__} is not served; wanted plain causal attention")
    kinds = dict(_parts(mask_function))
    step = _STEP.get()
    if (chunk := kinds.pop("chunk", None)) and (step is None or step.longest > chunk):
        raise ValueError(f"attention in chunks of {chunk} tokens is plain up to there; pass max_model_len={chunk}")
    if other := [name for name in kinds if name not in ("causal", "window")]:
        raise ValueError(f"a mask by {', '.join(other)} is not served; wanted plain causal attention")
    if "causal" not in kinds:
        raise ValueError("attention to later tokens is not served; wanted plain causal attention")
    return Mask(kinds.get("window") or 0)


def _parts(function: Callable[..., Any]) -> Iterator[tuple[str, int | None]]:
    """Yield the kinds of masks whose intersection a mask function of transformers is, windows and chunks with sizes."""
    name = function.__qualname__.partition(".")[0]
    held = {} if function.__closure__ is None else dict(zip(function.__code__.co_freevars, function.__closure__))  # noqa: B905
    if name == "causal_mask_function":
        yield "causal", None
    elif name == "and_masks":
        for part in held["mask_functions"].cell_contents:
            yield from _parts(part)
    elif name == "remap_positions_for_packed_sequence":  # positions within each request: they are so here
        yield from _parts(held["mask_function"].cell_contents)
    elif name == "packed_sequence_mask_function":  # of its own request's keys only: so it is here
        return
    elif name == "sliding_window_overlay":
        yield "window", int(held["sliding_window"].cell_contents)
    elif name == "chunked_overlay":
        yield "chunk", int(held["chunk_size"].cell_contents)
    else:
        yield function.__qualname__, None


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
    refused = {k: v for k, v in others.items() if v is not None and v is not False and k not in _HARMLESS}
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
        window = attention_mask.window
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
    window = attn_mask.window if isinstance(attn_mask, Mask) else 0
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    name = "scaled_dot_product_attention"
    return _attend(name, step, query, key, value, scale, window, 0.0, None).transpose(0, 1).unsqueeze(0)


def _attend(
    name: str, step: Step, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, softcap: float,
    sinks: Tensor | None,
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
    return attention(q_THE, k_cache, v_cache, *step.spans, scale, window, softcap, sinks)[..., :width]
