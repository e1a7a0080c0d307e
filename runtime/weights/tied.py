"""Whether a checkpoint's head is its embedding: a configuration that says so may be wrong, and then the file counts.

Source: transformers' tie_weights, which ties what is equal only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .file_formats import find_tensors, has_tensors
from .files import StoredTensor

_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_CHUNK_ELEMENTS = 1 << 24


def has_own_head(directory: Path) -> bool:
    """Return whether the directory's checkpoint has a head that differs from its embedding.

    Reads headers, and the two tensors where both are there, until a row differs. Raises ValueError for a damaged file.
    """
    if not has_tensors(directory):
        return False
    found, _, _ = find_tensors(directory, "auto")
    head, embedding = _named(found, _HEADS), _named(found, _EMBEDDINGS)
    return head is not None and embedding is not None and differ(found[head], found[embedding])


def differ(a: StoredTensor, b: StoredTensor) -> bool:
    """Return whether two tensors have other values, in whatever floating dtypes."""
    if a.shape != b.shape or a.dtype is None or b.dtype is None:
        return True
    if not a.shape or a.read_part is None or b.read_part is None:
        return not _same(a.load(), b.load())
    rows = a.shape[0]
    step = max(_CHUNK_ELEMENTS // max(math.prod(a.shape[1:]), 1), 1)
    pieces = ((i, min(i + step, rows)) for i in range(0, rows, step))
    return not all(_same(a.load_part(0, *piece), b.load_part(0, *piece)) for piece in pieces)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype == b.dtype:  # as bytes: NaN is NaN
        return bool(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)))
    return bool(torch.equal(a.double(), b.double()))


def _named(names: Iterable[str], ends: Sequence[str]) -> str | None:
    """Return the outermost name that ends so: modules that predict further tokens have an embedding of their own."""
    return min((n for n in names if f".{n}".endswith(tuple(f".{end}" for end in ends))), key=len, default=None)
