"""Reading a Hugging Face config.json, transformers 4 or 5, so that a wrong value is named before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Nothing real comes near these; a corrupt file easily does. Past them, building the module alone would hang.
_LARGEST_SIZE = 1 << 24
_LARGEST_DEPTH = 1 << 12
_FULL, _SLIDING = "full_attention", "sliding_attention"
# Names of the models that came before the common ones.
OLDER_NAMES = {
    "hidden_size": ("n_embd",),
    "num_hidden_layers": ("n_layer",),
    "num_attention_heads": ("n_head",),
    "max_position_embeddings": ("n_positions",),
    "dtype": ("torch_dtype",),
    "num_experts": ("num_local_experts", "n_routed_experts"),
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

    def count(self, name: str, default: int) -> int:
        """Return a whole number, 0 included."""
        return 0 if self.raw.get(name) == 0 and self.raw[name] is not False else self.size(name, default)

    def positive(self, name: str, default: float | None = None) -> float:
        """Return a positive finite number."""
        got = self._get(name, default)
        if not isinstance(got, (int, float)) or isinstance(got, bool) or not 0 < got < math.inf:
            raise ValueError(f"{self.where}: {name} is {got!r}, wanted a positive number")
        return float(got)

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a truth value."""
        got = self.raw.get(name)
        if got is not None and not isinstance(got, bool):
            raise ValueError(f"{self.where}: {name} is {got!r}, wanted true or false")
        return default if got is None else got

    def is_null(self, name: str) -> bool:
        """Return whether the configuration has the name and says null, which is not its default."""
        return name in self.raw and self.raw[name] is None

    def numbers(self, name: str, count: int) -> list[float]:
        """Return a list of that many positive numbers."""
        got = self._get(name, None)
        if not isinstance(got, list) or len(got) != count:
            shown = f"{len(got)} numbers" if isinstance(got, list) else repr(got)
            raise ValueError(f"{self.where}: {name} is {shown}, wanted a list of {count} numbers")
        return [Reader({name: number}, self.where).positive(name) for number in got]

    def windows(self, num_layers: int, slides: Callable[[int], bool], default: int | None = None) -> list[int]:
        """Return the tokens that each layer's attention sees, 0 for all: layer_types, else the layers that `slides`."""
        kinds = self.raw.get("layer_types")
        if kinds is None:
            kinds = [_SLIDING if slides(i) else _FULL for i in range(num_layers)]
        if not isinstance(kinds, list) or len(kinds) != num_layers or not {*kinds} <= {_SLIDING, _FULL}:
            wanted = f"a list of {num_layers} of {_FULL!r} and {_SLIDING!r}"
            raise ValueError(f"{self.where}: layer_types is {kinds!r}, wanted {wanted}")
        return [self.size("sliding_window", default) if kind == _SLIDING else 0 for kind in kinds]

    def part(self, name: str) -> Mapping[str, Any]:
        """Return an object within the configuration, empty where it is not there."""
        got = self.raw.get(name) or {}
        if not isinstance(got, Mapping):
            raise ValueError(f"{self.where}: {name} is {got!r}, wanted an object")
        return got

    def choice(self, name: str, known: tuple[str, ...], default: str | None = None) -> str:
        """Return one of the known words."""
        got = self._get(name, default)
        if got not in known:
            raise ValueError(f"{self.where}: {name} is {got!r}, wanted {' or '.join(map(repr, known))}")
        return str(got)

    def _get(self, name: str, default: Any) -> Any:
        for known in (name, *OLDER_NAMES.get(name, ())):
            if self.raw.get(known) is not None:
                return self.raw[known]
        if default is None:
            raise ValueError(f"{self.where}: {name} is missing")
        return default
