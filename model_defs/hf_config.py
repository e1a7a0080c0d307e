"""Reading a Hugging Face config.json, transformers 4 or 5, so that a wrong value is named before it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Nothing real comes near these; a corrupt file easily does. Past them, building the module alone would hang.
_LARGEST_SIZE = 1 << 24
_LARGEST_DEPTH = 1 << 12
# Names of the models that came before the common ones.
_OLDER_NAMES = {
    "hidden_size": ("n_embd",),
    "num_hidden_layers": ("n_layer",),
    "num_attention_heads": ("n_head",),
    "max_position_embeddings": ("n_positions",),
    "dtype": ("torch_dtype",),
}


@dataclass(frozen=True, slots=True)
class Reader:
    """Typed access to a configuration; `where` stands at the head of every error message."""

    raw: Mapping[str, Any]
    where: str

    def size(self, name: str, default: int | None = None) -> int:
        """Return a positive whole number of a sane size."""
        got = self._get(name, default)
        limit = _LARGEST_DEPTH if "layers" in name else _LARGEST_SIZE
        if not isinstance(got, int) or isinstance(got, bool) or not 1 <= got <= limit:
            raise ValueError(f"{self.where}: {name} is {got!r}, wanted a whole number from 1 to {limit}")
        return got

    def positive(self, name: str, default: float | None = None) -> float:
        """Return a positive finite number."""
        got = self._get(name, default)
        if not isinstance(got, (int, float)) or isinstance(got, bool) or not 0 < got < math.inf:
            raise ValueError(f"{self.where}: {name} is {got!r}, wanted a positive number")
        return float(got)

    def flag(self, name: str) -> bool:
        """Return a truth value, False where the configuration does not say."""
        got = self._get(name, False)
        if not isinstance(got, bool):
            raise ValueError(f"{self.where}: {name} is {got!r}, wanted true or false")
        return got

    def choice(self, name: str, known: tuple[str, ...], default: str | None = None) -> str:
        """Return one of the known words."""
        got = self._get(name, default)
        if got not in known:
            raise ValueError(f"{self.where}: {name} is {got!r}, wanted {' or '.join(map(repr, known))}")
        return str(got)

    def _get(self, name: str, default: Any) -> Any:
        for known in (name, *_OLDER_NAMES.get(name, ())):
            if self.raw.get(known) is not None:
                return self.raw[known]
        if default is None:
            raise ValueError(f"{self.where}: {name} is missing")
        return default
