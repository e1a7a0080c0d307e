"""The step's input buffers: allocated once, so that what was recorded finds its inputs where they were."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seamwise.runtime.build.step import FIELDS, Field, KVGroupInput, StepInput

_OF_MODEL = {name: declared.dims[0] for name, declared in FIELDS.items() if declared.reader in ("model", "adapters")}
_OF_GROUPS = {field.name for field in fields(KVGroupInput)}
OF_SEAMS = tuple(name for name, declared in FIELDS.items() if declared.reader == "seams")


def buffered(adapters: bool) -> dict[str, Field]:
    """Return the fields that a model's program reads, with adapters or without."""
    return {name: f for name, f in FIELDS.items() if f.in_forward or (adapters and f.reader == "adapters")}


def sizes_of(max_tokens: int, max_requests: int, max_blocks: int) -> dict[str, int]:
    """Return the sizes of buffers for the largest step, by letter."""
    return {"T": max_tokens, "R": max_requests, "S": max_requests + 1, "B": max_blocks, "L": max_tokens}


def num_bytes(sizes: dict[str, int], num_groups: int = 1, adapters: bool = False) -> int:
    """Return what buffers of these sizes take."""
    return sum(
        math.prod(declared.shape(sizes)) * declared.dtype.itemsize * (num_groups if name in _OF_GROUPS else 1)
        for name, declared in buffered(adapters).items()
    )


class StaticInputs:
    """Device buffers for the largest step; a step's tensors are views of their starts.

    Block tables keep their full width: rows of every step then have one stride. Further groups of the KV cache have
    buffers as the first has.
    """

    def __init__(self, sizes: dict[str, int], device: str, num_groups: int = 1, adapters: bool = False) -> None:
        self._buffers = {
            name: torch.zeros(declared.shape(sizes), dtype=declared.dtype, device=device)
            for name, declared in buffered(adapters).items()
        }
        own = KVGroupInput(slot_mapping=self._buffers["slot_mapping"], block_table=self._buffers["block_table"])
        self._groups = [own.map(torch.zeros_like) for _ in range(num_groups - 1)]

    def views(self, tokens: int, requests: int, adapters: bool = False) -> StepInput:
        """Return the starts of the buffers, as a step of so many tokens, all wanted, and requests.

        adapters  some of its requests have one
        """
        sizes = {"T": tokens, "R": requests, "S": requests + 1, "L": tokens}
        parts: dict[str, Any] = {
            name: buffer[: sizes[FIELDS[name].dims[0][0]]] for name, buffer in self._buffers.items()
        }
        if not adapters and "token_adapters" in parts:
            parts["token_adapters"] = parts["token_adapters"][:0]
        groups = [
            KVGroupInput(slot_mapping=g.slot_mapping[:tokens], block_table=g.block_table[:requests])
            for g in self._groups
        ]
        return StepInput(**parts, further_groups=tuple(groups))

    def fill(self, views: StepInput, batch: StepInput) -> None:
        """Copy a step into the buffers, by views of its size."""
        for name in self._buffers:
            values, view = getattr(batch, name), getattr(views, name)
            (view[:, : values.shape[1]] if name == "block_table" else view).copy_(values, non_blocking=True)
        for given, held in zip(batch.further_groups, views.further_groups, strict=True):
            held.slot_mapping.copy_(given.slot_mapping, non_blocking=True)
            held.block_table[:, : given.block_table.shape[1]].copy_(given.block_table, non_blocking=True)

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
                filled[name] = _padded(name, buffer[: sizes[_OF_MODEL[name]]], values)
            else:
                filled[name] = values.to(buffer.device, non_blocking=True)
        groups = [
            KVGroupInput(
                slot_mapping=_padded("slot_mapping", held.slot_mapping[:tokens], given.slot_mapping),
                block_table=given.block_table.to(held.block_table.device, non_blocking=True),
            )
            for given, held in zip(batch.further_groups, self._groups, strict=True)
        ]
        return StepInput(**filled, further_groups=tuple(groups))


def _padded(name: str, view: Tensor, values: Tensor) -> Tensor:
    """Fill a view with values and, behind them, the field's padding."""
    view.copy_(F.pad(values, (0, view.shape[0] - values.shape[0]), value=FIELDS[name].padding), non_blocking=True)
    return view
