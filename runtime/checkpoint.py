"""A model's weights, tensor by tensor, from any published format, checked against the model before any is read."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from .checkpoint_files import StoredTensor
from .checkpoint_formats import check_load_format, find_tensors

# What old checkpoints store though the model computes it: Llama's, saved by transformers before 4.31.
_COMPUTED_SUFFIXES = (".rotary_emb.inv_freq",)


class Source(Protocol):
    """Where weights come from: tensors by name, each read once when it is asked for."""

    def read(self, name: str, *, dtype: torch.dtype, device: str) -> Tensor: ...


def open_source(
    path: Path, parameters: Mapping[str, Sequence[int]], tied: Mapping[str, str] | None = None, *,
    dtype: torch.dtype, device: str, load_format: str = "auto", seed: int = 0,
) -> Source:  # fmt: skip
    """Open what gives a model with these parameters its weights; reads headers only.

    path         a directory, or one file
    parameters   name -> shape, tied ones under one name
    tied         other names of a parameter -> its name; a checkpoint may hold either or both
    load_format  one of LOAD_FORMATS; "auto": the first format of FORMATS that the directory holds; "dummy": seeded
                 random weights

    Raises ValueError when the checkpoint does not fit the model, or the model does not fit the machine.
    """
    check_load_format(load_format)
    needed, memory = sum(math.prod(s) for s in parameters.values()) * dtype.itemsize, _memory_bytes(device)
    if needed > memory:
        raise ValueError(
            f"{path}: the model has {needed / 1e9:.1f} GB of weights in {dtype}, {device} has {memory / 1e9:.1f} GB of"
            " memory; use a smaller model or dtype"
        )
    if load_format == "dummy":
        return DummyCheckpoint(parameters, seed)
    return Checkpoint.open(path, parameters, tied, load_format)


def load_weights(
    module: nn.Module, path: Path, *, dtype: torch.dtype, device: str, load_format: str = "auto", seed: int = 0
) -> None:
    """Give every parameter of a module built on the meta device its value, and move its buffers to the device.

    Peak memory is the model and one tensor. Raises ValueError as open_source does; the module is then as it was.
    """
    shapes, tied = parameter_shapes(module)
    source = open_source(path, shapes, tied, dtype=dtype, device=device, load_format=load_format, seed=seed)
    loaded = {}
    for name in show_progress(shapes, "loading weights"):
        loaded[name] = nn.Parameter(source.read(name, dtype=dtype, device=device), requires_grad=False)
    for name in (*shapes, *tied):
        parent, _, leaf = name.rpartition(".")
        module.get_submodule(parent).register_parameter(leaf, loaded[tied.get(name, name)])
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
        cls, path: Path, parameters: Mapping[str, Sequence[int]], tied: Mapping[str, str] | None = None,
        load_format: str = "auto",
    ) -> Checkpoint:  # fmt: skip
        """Open a checkpoint for a model with these parameters, as open_source describes."""
        found, problems, chosen = find_tensors(path, load_format)
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
                wanted = ", ".join(str(d).removeprefix("torch.") for d in chosen.dtypes)
                problems.append(f"dtype of {name} is {found[name].stored_dtype}, wanted one of {wanted}")
        extra = [n for n in found if n not in parameters and not n.endswith(_COMPUTED_SUFFIXES)]
        problems += [f"extra {name}" for name in extra]
        if problems:
            shown = "\n  ".join(problems[:20]) + ("\n  …" if len(problems) > 20 else "")
            raise ValueError(
                f"{path}: the checkpoint does not fit the model that its configuration describes"
                f" ({len(problems)} problems):\n  {shown}"
            )
        return cls({name: found[name] for name in parameters})

    def read(self, name: str, *, dtype: torch.dtype, device: str) -> Tensor:
        """Read one tensor into memory of its own, converted. Raises ValueError when the file is damaged or changed."""
        return self._tensors[name].load().to(device=device, dtype=dtype)


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


def _memory_bytes(device: str) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
