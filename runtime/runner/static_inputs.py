"""The step's input buffers: allocated once, so that what was recorded finds its inputs where they were."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seamwise.runtime.build.step import FIELDS, Field, StepInput

_OF_MODEL = {name for name, declared in FIELDS.items() if declared.reader in ("model", "adapters")}
OF_SEAMS = tuple(name for name, declared in FIELDS.items() if declared.reader == "seams")


def buffered(adapters: bool) -> dict[str, Field]:
    """Return the fields that a model's program reads, with adapters or without."""
    return {name: f for name, f in FIELDS.items() if f.in_forward or (adapters and f.reader == "adapters")}


def sizes_of(max_tokens: int, max_requests: int, max_blocks: int, num_groups: int = 1) -> dict[str, int]:
    """Return the sizes of buffers for the largest step, by letter."""
    of_rows = {"T": max_tokens, "R": max_requests, "S": max_requests + 1, "L": max_tokens}
    return {**of_rows, "B": max_blocks, "G": num_groups}


def num_bytes(sizes: dict[str, int], adapters: bool = False) -> int:
    """Return what buffers of these sizes take."""
    return sum(math.prod(f.shape(sizes)) * f.dtype.itemsize for f in buffered(adapters).values())


class StaticInputs:
    """Device buffers for the largest step; a step's tensors are views of their starts.

    Block tables keep their full width: rows of every step then have one stride.
    """

    def __init__(self, sizes: dict[str, int], device: str, adapters: bool = False) -> None:
        self._buffers = {
            name: torch.zeros(declared.shape(sizes), dtype=declared.dtype, device=device)
            for name, declared in buffered(adapters).items()
        }

    def views(self, tokens: int, requests: int, adapters: bool = False) -> StepInput:
        """Return the starts of the buffers, as a step of so many tokens, all wanted, and requests.

        adapters  some of its requests have one
        """
        sizes = {"T": tokens, "R": requests, "S": requests + 1, "L": tokens}
        parts: dict[str, Any] = {name: self._start(name, sizes) for name in self._buffers}
        if not adapters and "token_adapters" in parts:
            parts["token_adapters"] = parts["token_adapters"][:0]
        return StepInput(**parts)

    def _start(self, name: str, sizes: dict[str, int]) -> Tensor:
        """Return the first rows of a buffer, of each group of the KV cache that it has."""
        buffer, dims = self._buffers[name], FIELDS[name].dims[0]
        return buffer.narrow(buffer.dim() - len(dims), 0, sizes[dims[0]])

    def fill(self, views: StepInput, batch: StepInput) -> None:
        """Copy a step into the buffers, by views of its size."""
        for name in self._buffers:
            values, view = getattr(batch, name), getattr(views, name)
            (view[..., : values.shape[-1]] if name == "block_table" else view).copy_(values, non_blocking=True)

    def fill_padded(self, batch: StepInput, tokens: int, rows: int) -> StepInput:
        """Copy a step into the buffers, padded to so many tokens and wanted rows, and return it as views of them.

        What only seams read moves to the device as it is. A row of padding belongs to no request, and its slot of -1
        stores nothing.
        """
        filled: dict[str, Any] = {}
        sizes = {"T": tokens, "L": rows}
        for name, buffer in self._buffers.items():
            values: Tensor = getattr(batch, name)
            if name == "token_adapters" and not len(values):
                filled[name] = buffer[:0]  # of no row
            elif name in _OF_MODEL:
                filled[name] = _padded(name, self._start(name, sizes), values)
            else:
                filled[name] = values.to(buffer.device, non_blocking=True)
        return StepInput(**filled)


def _padded(name: str, view: Tensor, values: Tensor) -> Tensor:
    """Fill a view with values and, behind them, the field's padding."""
    view.copy_(F.pad(values, (0, view.shape[-1] - values.shape[-1]), value=FIELDS[name].padding), non_blocking=True)
    return view
