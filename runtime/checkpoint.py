"""Read a checkpoint tensor by tensor: one or many safetensors files, checked against the model before anything is read.

Source: the safetensors format, https://huggingface.co/docs/safetensors/index#format.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Old Llama checkpoints store what the model computes; it is not a parameter.
_COMPUTED_SUFFIXES = (".rotary_emb.inv_freq",)


class Checkpoint:
    """Tensors by name. `open` raises one ValueError that lists every missing, extra and mis-shaped tensor."""

    def __init__(self, files: Mapping[str, Any], parameters: Mapping[str, tuple[int, ...]]) -> None:
        self._files = files
        self._parameters = parameters

    @classmethod
    def open(cls, directory: Path, parameters: Mapping[str, tuple[int, ...]], tied: Mapping[str, str]) -> Checkpoint:
        """Open a directory's checkpoint for a model with these parameters.

        parameters  name -> shape, tied ones under one name
        tied        other names of a parameter -> its name; a checkpoint may hold either or both
        """
        files = {name: handle for path in _paths(directory) for name, handle in _open(path).items()}
        for alias, name in tied.items():
            if name not in files and alias in files:
                files[name] = _Renamed(files[alias], alias)
            files.pop(alias, None)
        problems = []
        for name, shape in parameters.items():
            if name not in files:
                problems.append(f"missing {name} {shape}")
            elif (got := tuple(files[name].get_slice(name).get_shape())) != tuple(shape):
                problems.append(f"shape of {name} is {got}, wanted {tuple(shape)}")
        extra = [n for n in files if n not in parameters and not n.endswith(_COMPUTED_SUFFIXES)]
        problems += [f"extra {name}" for name in extra]
        if problems:
            shown = "\n  ".join(problems[:20]) + ("\n  …" if len(problems) > 20 else "")
            raise ValueError(
                f"{directory}: the checkpoint does not fit the model ({len(problems)} problems):\n  {shown}"
            )
        return cls(files, parameters)

    def read(self, name: str, *, dtype: torch.dtype, device: str) -> Tensor:
        """Read one tensor, converted. Raises ValueError when its dtype is no floating type."""
        tensor = self._files[name].get_tensor(name)
        if not tensor.is_floating_point():
            raise ValueError(
                f"{name} is stored as {tensor.dtype}, wanted a floating type (quantized weights are not served)"
            )
        return tensor.to(device=device, dtype=dtype)


class DummyCheckpoint:
    """Seeded random weights, the same for a name whatever else is read: norms are ones, the rest small normal."""

    def __init__(self, parameters: Mapping[str, tuple[int, ...]], seed: int) -> None:
        self._parameters = parameters
        self._seed = seed

    def read(self, name: str, *, dtype: torch.dtype, device: str) -> Tensor:
        shape = tuple(self._parameters[name])
        if len(shape) == 1 and name.endswith("weight"):
            return torch.ones(shape, dtype=dtype, device=device)
        seed = int.from_bytes(hashlib.sha256(f"{self._seed}:{name}".encode()).digest()[:7], "little")
        generator = torch.Generator(device).manual_seed(seed)
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)


class _Renamed:
    """A safetensors handle that answers to another name for one tensor."""

    def __init__(self, handle: Any, stored: str) -> None:
        self._handle, self._stored = handle, stored

    def get_slice(self, _: str) -> Any:
        return self._handle.get_slice(self._stored)

    def get_tensor(self, _: str) -> Tensor:
        return self._handle.get_tensor(self._stored)


def _paths(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not a safetensors index: {error!r}") from error
        for name in names:
            if not isinstance(name, str) or not (directory / name).is_file() or Path(name).name != name:
                raise ValueError(f"{index}: names {name!r}, which is not a file of {directory}")
        return [directory / name for name in names]
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    raise ValueError(f"{directory}: has neither model.safetensors nor model.safetensors.index.json")


def _open(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(path, framework="pt")
        return dict.fromkeys(handle.keys(), handle)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
