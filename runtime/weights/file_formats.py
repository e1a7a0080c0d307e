"""The formats of checkpoints, and which files of a directory make one up: one file, or those that an index names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from seamwise.runtime.weights.gguf import quants as gguf_quants
from seamwise.runtime.weights.gguf.weights import read_gguf

from . import format_npz, format_safetensors, format_torch
from .files import StoredTensor

_SHARD = re.compile(r"-(\d+)-of-(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """file: the usual name in a directory; pattern: what another name may be; dtypes: those that `read` can load;
    joins: it finds the other shards by the first."""

    file: str
    pattern: str
    read: Callable[[Path], dict[str, StoredTensor]]
    dtypes: Iterable[object]
    joins: bool = False

    def find(self, path: Path) -> Path | None:
        """Return the index or the one file of this format. Raises ValueError where there are several without index."""
        if path.is_file():
            return path if path.match(self.pattern) else None
        whole, index = path / self.file, path / f"{self.file}.index.json"
        if index.is_file() and not (whole.is_file() and not _has_its_files(index)):
            return index
        if whole.is_file():
            return whole
        others = sorted(path.glob(self.pattern))
        if shards := _shards(others):
            return shards[0]
        if len(others) > 1:
            names = ", ".join(p.name for p in others[:5])
            raise ValueError(
                f"{path}: holds {len(others)} files {self.pattern} ({names}) and no {self.file}.index.json; wanted one"
            )
        return others[0] if others else None


# In the order in which "auto" looks for them.
FORMATS = {
    "safetensors": Format(
        file="model.safetensors", pattern="*.safetensors", read=format_safetensors.read_safetensors,
        dtypes=format_safetensors.DTYPES,
    ),
    "pt": Format(
        file="pytorch_model.bin", pattern="pytorch_model*.bin", read=format_torch.read_torch, dtypes=format_torch.DTYPES
    ),
    "npz": Format(file="model.npz", pattern="*.npz", read=format_npz.read_npz, dtypes=format_npz.DTYPES),
    "gguf": Format(file="model.gguf", pattern="*.gguf", read=read_gguf, dtypes=gguf_quants.KINDS, joins=True),
}  # fmt: skip
LOAD_FORMATS = ("auto", *FORMATS, "dummy")


def check_load_format(load_format: str) -> None:
    """Raise ValueError for an unknown load_format."""
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format={load_format!r}: wanted one of {', '.join(map(repr, LOAD_FORMATS))}")


def has_tensors(path: Path) -> bool:
    """Return whether a directory holds a checkpoint of any format."""
    return any(one.find(path) for one in FORMATS.values())


def find_tensors(path: Path, load_format: str) -> tuple[dict[str, StoredTensor], list[str], Format]:
    """Return the tensors of a directory or file by name, what an index promises but no file holds, and the format.

    load_format  "auto": the first of FORMATS that is there; or one of FORMATS
    """
    chosen = list(FORMATS.values()) if load_format == "auto" else [FORMATS[load_format]]
    for one in chosen:
        if (found := one.find(path)) is not None:
            return (*_read(found, one), one)
    wanted = ", ".join(f"{one.file} (or {one.pattern})" for one in chosen)
    raise ValueError(
        f"{path}: has no checkpoint; wanted {wanted}, or an index of several, like {chosen[0].file}.index.json"
    )


def _read(path: Path, format: Format) -> tuple[dict[str, StoredTensor], list[str]]:
    if path.suffix == ".json":
        return _indexed(path, format)
    found: dict[str, StoredTensor] = {}
    several = _SHARD.search(path.name) and not format.joins
    for shard in _shards(sorted(path.parent.glob(format.pattern))) if several else [path]:
        stored = format.read(shard)
        if twice := sorted(found.keys() & stored.keys()):
            raise ValueError(
                f"{shard}: has {', '.join(twice[:5])}, which another shard has too, and no index says which"
            )
        found |= stored
    return found, []


def _shards(files: Sequence[Path]) -> list[Path]:
    """Return files that are, by their names, all shards of one checkpoint without an index; else none."""
    matches = [_SHARD.search(file.name) for file in files]
    counts = {match and match[2] for match in matches}
    if len(counts) != 1 or None in counts:
        return []
    numbers = [int(match[1]) for match in matches if match]
    if numbers != [*range(1, len(files) + 1)] or len(files) != int(next(iter(counts)) or 0):
        names = ", ".join(file.name for file in files[:5])
        raise ValueError(f"{files[0].parent}: has {len(files)} shards ({names}), wanted all; download what is missing")
    return [*files]


def _has_its_files(index: Path) -> bool:
    """Return whether the files that an index names are there: beside one whole file it may have been left behind."""
    try:
        names = {*json.loads(index.read_text())["weight_map"].values()}
        return all((index.parent / name).is_file() for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _indexed(index: Path, format: Format) -> tuple[dict[str, StoredTensor], list[str]]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: not an index of a checkpoint: {error!r}; download it again") from error
    found: dict[str, StoredTensor] = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (index.parent / name).is_file():
            raise ValueError(
                f"{index}: names {name!r}, which is not a file of {index.parent}; download what is missing"
            )
        stored = format.read(index.parent / name)
        # A tensor that stands in two files is the one where the index says.
        found |= {n: t for n, t in stored.items() if weight_map.get(n, name) == name}
    return found, [f"{n} is not in {file}, where {index.name} says" for n, file in weight_map.items() if n not in found]
