"""A tensor that a model reads of its checkpoint, as one record from the module's names to the pack's manifest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

MODELS, STORED = "the model's", "as stored"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """What a checkpoint is to hold.

    dtype    the name of its own, or MODELS: the model's; STORED: any floating one, as it is stored
    aliases  its other names in the model: a checkpoint may hold any of them
    """

    shape: tuple[int, ...]
    dtype: str = MODELS
    aliases: tuple[str, ...] = ()

    @property
    def own_dtype(self) -> torch.dtype | None:
        """The dtype that it must have; None: any floating one."""
        return None if self.dtype in (MODELS, STORED) else getattr(torch, self.dtype)

    def read_as(self, dtype: torch.dtype) -> torch.dtype | None:
        """Return what it is converted to in a model of this dtype; None: nothing."""
        return dtype if self.dtype == MODELS else self.own_dtype


def dtype_name(dtype: torch.dtype | None) -> str:
    """Return what Parameter.dtype says of a dtype; None: STORED."""
    return STORED if dtype is None else str(dtype).removeprefix("torch.")


def parameters_in(module: nn.Module) -> dict[str, Parameter]:
    """Return what a checkpoint holds of a module by its first names: parameters, and buffers that are persistent."""
    held, names = module.state_dict(keep_vars=True), dict[int, list[str]]()
    for name, tensor in held.items():
        names.setdefault(id(tensor), []).append(name)
    return {
        name: Parameter(
            shape=tuple(held[name].shape), aliases=tuple(others),
            dtype=MODELS if isinstance(held[name], nn.Parameter) else dtype_name(held[name].dtype),
        )
        for name, *others in names.values()
    }  # fmt: skip
