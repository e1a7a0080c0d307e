"""Positions of a step's tokens, for classes of transformers whose forward takes none, or takes them counted otherwise.

A model of one request counts its tokens from 0. A step's row holds many requests, so what counts is told instead: the
embeddings of positions, by the argument that they have for it, and ALiBi, which needs each head's slope alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .hf_scores import Alibi

_POSITIONS: ContextVar[Tensor | None] = ContextVar("seamwise_positions", default=None)


def place(model: nn.Module, takes_positions: bool) -> int:
    """Let a model's embeddings of positions read the step's; return how many there are.

    Those are modules that take position_ids, or keep a table that they make longer (make_weights). RoBERTa's family
    counts from padding_idx + 1; the position_ids that it is given are taken as they are.
    """
    count = 0
    for module in model.modules():
        parameters = inspect.signature(type(module).forward).parameters
        if hasattr(module, "make_weights"):
            module.forward = partial(_look_up, module, getattr(module, "offset", 0))
            count += 1
            continue
        if hasattr(module, "create_position_ids_from_input_ids"):
            module.register_forward_pre_hook(_giving(int(module.padding_idx) + 1, row=True), with_kwargs=True)  # type: ignore[arg-type]
        elif not takes_positions and isinstance(module, nn.Embedding) and "position_ids" in parameters:
            module.register_forward_pre_hook(_giving(0, row=False), with_kwargs=True)
        else:
            continue
        count += 1
    return count


def tune(model: nn.Module) -> None:
    """Let attention that scales queries by their positions (Llama 4's, where it does not rotate) read the step's.

    Its own code counts the rows from 0; it is told not to, and what its q_proj gives is scaled.
    """
    modules: Any = model.modules()
    for module in modules:
        if getattr(module, "attn_temperature_tuning", False) and hasattr(module, "q_proj") and not module.use_rope:
            module.attn_temperature_tuning = False
            module.q_proj.register_forward_hook(partial(_tuned, module.attn_scale, module.floor_scale))


def _tuned(attn_scale: float, floor_scale: float, module: nn.Module, given: Any, queries_1TD: Tensor) -> Tensor:
    positions = _POSITIONS.get()
    assert positions is not None
    scales_T = torch.log1p(torch.floor((positions.float() + 1.0) / floor_scale)) * attn_scale + 1.0
    return (queries_1TD * scales_T[:, None]).to(queries_1TD.dtype)


def _look_up(module: Any, first: int, given: Tensor, *_: Any, **__: Any) -> Tensor:
    """Return the rows of a table of sinusoids (XGLM, MusicGen), which theirs would make longer where it ends."""
    positions = _POSITIONS.get()
    assert positions is not None
    rows_TD: Tensor = module.weights[positions + first]
    return rows_TD.unsqueeze(0)


def _giving(first: int, *, row: bool) -> Callable[..., Any]:
    def give(module: nn.Module, args: Any, kwargs: Any) -> Any:
        positions = _POSITIONS.get()
        assert positions is not None
        return args, {**kwargs, "position_ids": (positions.unsqueeze(0) if row else positions) + first}

    return give


def _by_length(make: Callable[..., Tensor], num_heads: int, length: int, *others: Any, **options: Any) -> Tensor:
    return make(num_heads, 2, *others, **options)


def _by_slope(make: Callable[..., Tensor], *args: Any) -> Tensor:
    slopes_H = make(*args)
    return torch.stack((torch.zeros_like(slopes_H), slopes_H), -1)


def _by_mask(make: Callable[..., Tensor], mask: Tensor, *others: Any, **options: Any) -> Tensor:
    return make(mask.new_ones(1, 2), *others, **options)


# Functions of transformers' modules that make ALiBi, and how each makes the first two keys' part of it.
_MAKERS: dict[str, Callable[..., Tensor]] = {
    "build_mpt_alibi_tensor": _by_length,
    "_get_alibi_slopes": _by_slope,
    "build_alibi_tensor": _by_mask,
}


def alibi_makers(module: ModuleType) -> dict[str, tuple[ModuleType, Callable[..., Tensor]]]:
    """Return the functions of a module of transformers that make ALiBi, by name."""
    return {name: (module, getattr(module, name)) for name in _MAKERS if hasattr(module, name)}


@contextmanager
def placing(positions: Tensor, makers: Mapping[str, tuple[ModuleType, Callable[..., Tensor]]]) -> Iterator[None]:
    """Within this context, this thread's calls of a model have a step's positions, and ALiBi by its slopes."""
    token = _POSITIONS.set(positions)

    def making(name: str, make: Callable[..., Tensor]) -> Callable[..., Any]:
        def alibi(*args: Any, **options: Any) -> Any:
            if _POSITIONS.get() is not positions:
                return make(*args, **options)
            first_H2 = _MAKERS[name](make, *args, **options).reshape(-1, 2)
            return Alibi(first_H2[:, 1] - first_H2[:, 0], positions.shape[0])

        return alibi

    for name, (module, make) in makers.items():
        setattr(module, name, making(name, make))
    try:
        yield
    finally:
        for name, (module, make) in makers.items():
            setattr(module, name, make)
        _POSITIONS.reset(token)
