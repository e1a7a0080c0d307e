"""The step's input buffers: allocated once, so that what was recorded finds its inputs where they were."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seamwise.runtime.build.step import FIELDS, StepInput


class StaticInputs:
    """Device buffers for the largest step; a step's tensors are views of their starts.

    The block table keeps its full width: rows of every step then have one stride.
    """

    def __init__(self, *, max_tokens: int, max_requests: int, max_blocks: int, device: str) -> None:
        sizes = {"T": max_tokens, "R": max_requests, "S": max_requests + 1, "B": max_blocks, "L": max_tokens}
        self._buffers = {
            name: torch.zeros([sizes[dim] for dim in dims], dtype=dtype, device=device)
            for name, (dtype, dims) in FIELDS.items()
        }

    def fill(self, batch: StepInput, tokens: int | None = None, rows: int | None = None) -> StepInput:
        """Copy a step into the buffers and return it as views of them.

        With `tokens` and `rows` it is padded to so many, and what only seams read moves to the device as it is. A row
        of padding belongs to no request, and its slot of -1 stores nothing.
        """
        sizes = {"token_ids": tokens, "positions": tokens, "slot_mapping": tokens, "logit_rows": rows}
        filled = {}
        for name, buffer in self._buffers.items():
            values = getattr(batch, name)
            if tokens is not None and name not in sizes:
                filled[name] = values.to(buffer.device, non_blocking=True)
            elif name == "block_table":
                requests, blocks = values.shape
                buffer[:requests, :blocks].copy_(values)
                filled[name] = buffer[:requests]
            else:
                filled[name] = _put(buffer, values, sizes.get(name), -1 if name == "slot_mapping" else 0)
        return StepInput(**filled)


def _put(buffer: Tensor, values: Tensor, size: int | None = None, padding: int = 0) -> Tensor:
    count = values.shape[0]
    view = buffer[: size or count]
    view.copy_(F.pad(values, (0, view.shape[0] - count), value=padding) if size else values, non_blocking=True)
    return view
