"""Read a checkpoint tensor by tensor: one or many safetensors files, checked against the model before anything is read.

Tensors are read with plain file reads into memory of their own. A memory map would read the same bytes through page
faults (measured on SmolLM2-135M, 269 MB, 2 cores: copy out of a map 0.5-1.7 s, reads 0.06 s), leaves tensors aligned
to 8 bytes, and kills the process when somebody saves over the file.
Source: the safetensors format, https://huggingface.co/docs/safetensors/index#format.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LARGEST_HEADER = 100_000_000  # bytes; the format's own limit
# What old checkpoints store though the model computes it: Llama's, saved by transformers before 4.31.
_COMPUTED_SUFFIXES = (".rotary_emb.inv_freq",)


class Source(Protocol):
    """Where weights come from: tensors by name, each read once when it is asked for."""

    def read(self, name: str, *, dtype: torch.dtype, device: str) -> Tensor: ...


def load_weights(
    module: nn.Module, directory: Path, *, dtype: torch.dtype, device: str, load_format: str = "auto", seed: int = 0
) -> None:
    """Give every parameter of a module built on the meta device its value, and move its buffers to the device.

    load_format  "auto": the directory's checkpoint; "dummy": seeded random weights

    Peak memory is the model and one tensor. Raises ValueError when the checkpoint does not fit the module.
    """
    if load_format not in ("auto", "dummy"):
        raise ValueError(f"load_format={load_format!r}: wanted 'auto' or 'dummy'")
    shapes, tied = parameter_shapes(module)
    dummy = load_format == "dummy"
    source: Source = DummyCheckpoint(shapes, seed) if dummy else Checkpoint.open(directory, shapes, tied)
    loaded = {}
    for name in show_progress(shapes, "loading weights"):
        loaded[name] = nn.Parameter(source.read(name, dtype=dtype, device=device), requires_grad=False)
    for name in (*shapes, *tied):
        path, _, leaf = name.rpartition(".")
        module.get_submodule(path).register_parameter(leaf, loaded[tied.get(name, name)])
    for owner in module.modules():
        for leaf, buffer in list(owner.named_buffers(recurse=False)):
            setattr(owner, leaf, buffer.to(device))


def parameter_shapes(module: nn.Module) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return name -> shape of each parameter, and the other names of tied ones -> their name."""
    shapes: dict[str, tuple[int, ...]] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        kept = first.setdefault(id(parameter), name)
        if kept == name:
            shapes[name] = tuple(parameter.shape)
        else:
            tied[name] = kept
    return shapes, tied


def show_progress(items: Iterable[str], label: str) -> Iterable[str]:
    """Return the items, with a progress bar on stderr when that is a terminal."""
    if not sys.stderr.isatty():
        return items
    from tqdm import tqdm

    return tqdm(items, desc=label, unit="tensor", leave=False)


class Checkpoint:
    """Tensors by name. `open` raises one ValueError that lists every missing, extra and mis-shaped tensor."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors

    @classmethod
    def open(
        cls, directory: Path, parameters: Mapping[str, Sequence[int]], tied: Mapping[str, str] | None = None
    ) -> Checkpoint:
        """Open a directory's checkpoint for a model with these parameters; reads headers only.

        parameters  name -> shape, tied ones under one name
        tied        other names of a parameter -> its name; a checkpoint may hold either or both
        """
        found, problems = _index(directory)
        for alias, name in (tied or {}).items():
            if alias in found:
                found.setdefault(name, found.pop(alias))
                found.pop(alias, None)
        for name, shape in parameters.items():
            if name not in found:
                problems.append(f"missing {name}, shape {tuple(shape)}")
            elif found[name].shape != tuple(shape):
                problems.append(f"shape of {name} is {found[name].shape}, wanted {tuple(shape)}")
            elif found[name].dtype is None:
                problems.append(f"dtype of {name} is {found[name].stored_dtype}, wanted one of {', '.join(_DTYPES)}")
        extra = [n for n in found if n not in parameters and not n.endswith(_COMPUTED_SUFFIXES)]
        problems += [f"extra {name}" for name in extra]
        if problems:
            shown = "\n  ".join(problems[:20]) + ("\n  …" if len(problems) > 20 else "")
            raise ValueError(
                f"{directory}: the checkpoint does not fit the model that config.json describes"
                f" ({len(problems)} problems):\n  {shown}"
            )
        return cls({name: found[name] for name in parameters})

    def read(self, name: str, *, dtype: torch.dtype, device: str) -> Tensor:
        """Read one tensor into memory of its own, converted. Raises ValueError when the file has become shorter."""
        return self._tensors[name].read().to(device=device, dtype=dtype)


class DummyCheckpoint:
    """Seeded random weights, the same for a name whatever else is read: norms are ones, the rest small normal."""

    def __init__(self, parameters: Mapping[str, Sequence[int]], seed: int) -> None:
        self._parameters = parameters
        self._seed = seed

    def read(self, name: str, *, dtype: torch.dtype, device: str) -> Tensor:
        shape = tuple(self._parameters[name])
        if len(shape) == 1 and name.endswith("weight"):
            return torch.ones(shape, dtype=dtype, device=device)
        seed = int.from_bytes(hashlib.sha256(f"{self._seed}:{name}".encode()).digest()[:7], "little")
        generator = torch.Generator(device).manual_seed(seed)
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a tensor's bytes lie in a safetensors file; dtype is None where Seamwise does not compute in it."""

    path: Path
    identity: tuple[int, ...]  # of the file whose header was read
    start: int
    num_bytes: int
    shape: tuple[int, ...]
    stored_dtype: str

    @property
    def dtype(self) -> torch.dtype | None:
        return _DTYPES.get(self.stored_dtype)

    def read(self) -> Tensor:
        assert self.dtype is not None
        raw = torch.empty(self.num_bytes, dtype=torch.uint8)
        view, done = raw.numpy().data, 0
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            while done < self.num_bytes and (got := file.readinto(view[done:])):  # at most 2 GiB a read on Linux
                done += got
            if done < self.num_bytes or _identity(file) != self.identity:
                raise ValueError(f"{self.path}: the file changed while it was read; load it again")
        return raw.view(self.dtype).view(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file. Raises ValueError naming the file for anything but a complete one."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length).decode())
            identity = _identity(file)
        if not isinstance(header, dict):
            raise ValueError("the header is not an object")
        header.pop("__metadata__", None)
        start = 8 + length
        tensors = {name: _stored(path, identity, name, entry, start) for name, entry in header.items()}
        end = start
        for name, t in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
            if t.start != end:
                raise ValueError(f"{name} starts at byte {t.start}, wanted {end}, where the tensor before it ends")
            end = t.start + t.num_bytes
        if end != size:
            raise ValueError(f"the header describes {end} bytes, the file has {size}: it is truncated or damaged")
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{path}: not a readable safetensors file: {error}; download it again") from error
    return tensors


def _identity(file: IO[bytes]) -> tuple[int, ...]:
    stat = os.fstat(file.fileno())
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _stored(path: Path, identity: tuple[int, ...], name: str, entry: Any, start: int) -> StoredTensor:
    if not isinstance(entry, dict):
        raise ValueError(f"the entry of {name} is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(dtype, str) and _naturals(shape) and _naturals(offsets) and len(offsets) == 2):
        raise ValueError(f"the entry of {name} is {entry!r:.200}, wanted dtype, shape and data_offsets")
    num_bytes = offsets[1] - offsets[0]
    if num_bytes < 0 or (dtype in _DTYPES and num_bytes != math.prod(shape) * _DTYPES[dtype].itemsize):
        raise ValueError(f"{name} of dtype {dtype} and shape {tuple(shape)} has {num_bytes} bytes")
    start += offsets[0]
    return StoredTensor(
        path=path, identity=identity, start=start, num_bytes=num_bytes, shape=tuple(shape), stored_dtype=dtype
    )


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _index(directory: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """Return a directory's tensors by name, and what its index promises but its files do not hold."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        path = directory / "model.safetensors"
        if not path.is_file():
            raise ValueError(f"{directory}: has neither {path.name} nor {index.name}; wanted a safetensors checkpoint")
        return read_header(path), []
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: not a safetensors index: {error!r}; download it again") from error
    found: dict[str, StoredTensor] = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (directory / name).is_file():
            raise ValueError(f"{index}: names {name!r}, which is not a file of {directory}")
        stored = read_header(directory / name)
        # A tensor that stands in two files is the one where the index says.
        found |= {n: t for n, t in stored.items() if weight_map.get(n, name) == name}
    return found, [f"{n} is not in {file}, where {index.name} says" for n, file in weight_map.items() if n not in found]
