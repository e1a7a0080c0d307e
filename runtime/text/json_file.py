"""A model's files of JSON: each complaint names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

Kind = TypeVar("Kind", dict[str, Any], list[Any])


def read_json(path: Path, kind: type[Kind]) -> Kind:
    """Return what a file holds. Raises ValueError when it cannot be read, is no JSON or holds another kind."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"), object_hook=_as_float)
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        what = "cannot be read" if isinstance(error, OSError) else "not valid JSON"
        raise ValueError(f"{path}: {what}: {error}") from error
    if not isinstance(read, kind):
        raise ValueError(f"{path}: holds {type(read).__name__}, wanted {'an object' if kind is dict else 'a list'}")
    return read


def _as_float(read: dict[str, Any]) -> Any:
    """Return the number that transformers writes as an object, because JSON has no infinity: {"__float__": "NaN"}."""
    return float(read["__float__"]) if read.keys() == {"__float__"} and isinstance(read["__float__"], str) else read
