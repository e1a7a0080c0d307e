"""Writing a checkpoint: safetensors shards and their index, as every loader of Hugging Face models reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoint import parameter_shapes, show_progress

_SHARD_BYTES = 5_000_000_000


def save_weights(module: nn.Module, directory: Path, *, max_shard_bytes: int = _SHARD_BYTES) -> None:
    """Write what a checkpoint of a module holds, tied parameters once; load_weights gives it back bit for bit."""
    tensors = module.state_dict(keep_vars=True)
    save_tensors({n: tensors[n] for n in parameter_shapes(module)[0]}, directory, max_shard_bytes)


def save_tensors(tensors: Mapping[str, Tensor], directory: Path, max_shard_bytes: int = _SHARD_BYTES) -> None:
    """Write tensors of any device and stride to model.safetensors, or to shards of at most max_shard_bytes each.

    A tensor larger than that is a shard of its own. The index is written last, each file under another name first: a
    directory never holds half a checkpoint under the name of a whole one. Peak memory is one shard beside the tensors.
    Raises ValueError for a directory that holds weights already, or a tensor without values.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}: wanted at least 1")
    if found := sorted(directory.glob("*.safetensors*")):
        raise ValueError(f"{directory}: holds {found[0].name} already; wanted a directory without weights")
    if meta := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(f"{meta[0]} is on the meta device and has no values to save")
    directory.mkdir(parents=True, exist_ok=True)
    shards = _shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        _write({name: tensors[name] for name in shards[0]}, directory / "model.safetensors")
        return
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names_of = dict(zip(files, shards, strict=True))
    for file in show_progress(files, "saving weights"):
        _write({name: tensors[name] for name in names_of[file]}, directory / file)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": {name: file for file, names in names_of.items() for name in names},
    }
    partial = directory / ".index.partial"
    partial.write_text(json.dumps(index, indent=1))
    partial.rename(directory / "model.safetensors.index.json")


def _shards(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    # Copies: the writer refuses tensors that are views of one storage, as the rows of a packed weight are.
    owned = {n: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for n, t in tensors.items()}
    partial = path.with_name(f".{path.name}.partial")
    save_file(owned, partial, metadata={"format": "pt"})  # transformers refuses a file that does not say "pt"
    partial.rename(path)
