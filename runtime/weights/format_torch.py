"""PyTorch files, as torch.save writes a state dict; torch.load(weights_only=True) runs no code of theirs.

They are memory-mapped, so that opening one allocates nothing; tensors are copied out one by one.
Source: https://docs.pytorch.org/docs/stable/generated/torch.load.html.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .files import StoredTensor, changed, identity_of

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read_torch(path: Path) -> dict[str, StoredTensor]:
    """Open a file of tensors by name. Raises ValueError naming the file for anything else, or for a damaged one."""
    try:
        identity = identity_of(path)
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged file makes torch raise any of a dozen types
        reason = str(error).partition("\n")[0]
        if "_use_new_zipfile_serialization" in str(error):
            reason = "it is of PyTorch before 1.6; save it again: torch.save(torch.load(path, weights_only=True), path)"
        raise ValueError(f"{path}: not a readable PyTorch file: {type(error).__name__}: {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise ValueError(f"{path}: holds a {type(tensors).__name__}, wanted a state dict, tensors by name")
    found = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"{path}: {name} is a {type(tensor).__name__}, wanted a dense tensor")
        dtype = tensor.dtype if tensor.dtype in DTYPES else None
        stored_dtype = str(tensor.dtype).removeprefix("torch.")
        load = _copying(path, identity, tensor)
        found[name] = StoredTensor(shape=tuple(tensor.shape), stored_dtype=stored_dtype, dtype=dtype, load=load)
    return found


def _copying(path: Path, identity: tuple[int, ...], mapped: Tensor) -> Callable[[], Tensor]:
    def load() -> Tensor:
        if identity_of(path) != identity:  # a map of a file that has become shorter kills the process
            raise changed(path)
        return mapped.detach().clone(memory_format=torch.contiguous_format)

    return load
