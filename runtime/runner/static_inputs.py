"""The step's input buffers: allocated once, so that what was recorded finds its inputs where they were."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seamwise.runtime.build.step import FIELDS, Field, StepInput

_OF_MODEL = {name: declared.dims[0] for name, declared in FIELDS.items() if declared.reader in ("model", "adapters")}
OF_SEAMS = tuple(name for name, declared in FIELDS.items() if declared.reader == "seams")


def buffered(adapters: bool) -> dict[str, Field]:
    """Return the fields that a model's program reads, with adapters or without."""
    return {name: f for name, f in FIELDS.items() if f.in_forward or (adapters and f.reader == "adapters")}


def sizes_of(max_tokens: int, max_requests: int, max_blocks: int) -> dict[str, int]:
    """Return the sizes of buffers for the largest step, by letter."""
    return {"T": max_tokens, "R": max_requests, "S": max_requests + 1, "B": max_blocks, "L": max_tokens}


def num_bytes(sizes: dict[str, int], adapters: bool) -> int:
    """Return what buffers of these sizes take."""
    return sum(math.prod(declared.shape(sizes)) * declared.dtype.itemsize for declared in buffered(adapters).values())


class StaticInputs:
    """Device buffers for the largest step; a step's tensors are views of their starts.

    The block table keeps its full width: rows of every step then have one stride.
    """

    def __init__(self, sizes: dict[str, int], device: str, adapters: bool) -> None:
        self._buffers = {
            name: torch.zeros(declared.shape(sizes), dtype=declared.dtype, device=device)
            for name, declared in buffered(adapters).items()
        }

    def views(self, tokens: int, requests: int) -> StepInput:
        """Return the starts of the buffers, as a step of so many tokens, all wanted, and requests."""
        sizes = {"T": tokens, "R": requests, "S": requests + 1, "L": tokens}
        parts: dict[str, Any] = {
            name: buffer[: sizes[FIELDS[name].dims[0][0]]] for name, buffer in self._buffers.items()
        }
        return StepInput(**parts)

    def fill(self, views: StepInput, batch: StepInput) -> None:
        """Copy a step into the buffers, by views of its size."""
        for name in self._buffers:
            values, view = getattr(batch, name), getattr(views, name)
            (view[:, : values.shape[1]] if name == "block_table" else view).copy_(values, non_blocking=True)

    def fill_padded(self, batch: StepInput, tokens: int, rows: int) -> StepInput:
        """Copy a step into the buffers, padded to so many tokens and wanted rows, and return it as views of them.

        What only seams read moves to the device as it is. A row of padding belongs to no request, and its slot of -1
        stores nothing.
        """
        filled: dict[str, Any] = {}
        sizes = {"T": tokens, "L": rows}
        for name, buffer in self._buffers.items():
            values: Tensor = getattr(batch, name)
            if name in _OF_MODEL:
                view = buffer[: sizes[_OF_MODEL[name]]]
                added = view.shape[0] - values.shape[0]
                view.copy_(F.pad(values, (0, added), value=FIELDS[name].padding), non_blocking=True)
                filled[name] = view
            else:
                filled[name] = values.to(buffer.device, non_blocking=True)
        return StepInput(**filled)
