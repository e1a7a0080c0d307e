"""A step between processes: a header that names its tensors, and their bytes as they are."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import torch
from torch import Tensor

from seamwise.runtime.build.step import FIELDS, PROTOCOL_VERSION, StepInput

Frames = list[bytes | memoryview]


class Header(msgspec.Struct, array_like=True):
    """version of the protocol; names and shapes of the tensors that follow."""

    version: int
    names: list[str]
    shapes: list[tuple[int, ...]]
    hidden_states: bool


def to_frames(batch: StepInput) -> Frames:
    """Return a step's header and the bytes of each of its tensors."""
    named = [(name, tensor) for name in FIELDS if (tensor := getattr(batch, name)) is not None]
    header = Header(
        PROTOCOL_VERSION, [name for name, _ in named], [tuple(t.shape) for _, t in named], batch.hidden_states
    )
    return [msgspec.msgpack.encode(header), *(t.numpy().tobytes() for _, t in named)]


def from_frames(frames: Sequence[bytes | memoryview]) -> StepInput:
    """Return the step of some frames. Raises ValueError for one of another version of the protocol."""
    header = msgspec.msgpack.decode(frames[0], type=Header)
    if header.version != PROTOCOL_VERSION:
        raise ValueError(
            f"a step of protocol version {header.version} came, this is version {PROTOCOL_VERSION}; run one version of"
            " seamwise on every rank"
        )
    tensors = {
        name: _tensor(frame, FIELDS[name].dtype, shape)
        for frame, name, shape in zip(frames[1:], header.names, header.shapes, strict=True)
    }
    return StepInput(**tensors, hidden_states=header.hidden_states)


def _tensor(frame: bytes | memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    kind = np.dtype(str(dtype).removeprefix("torch."))
    return torch.from_numpy(np.frombuffer(bytearray(frame), kind).reshape(shape))
