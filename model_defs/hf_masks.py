"""What a causal mask of transformers means: the model's own code is handed that, and not a tensor.

A step is a row of tokens of many requests, whose mask no model can know; attention's contract has it. So a model that
asks for a mask gets an object that may be handed on, cut, inverted and applied to scores, but never read.
Source: transformers/masking_utils.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

LOWEST = -6e4  # what is added where a key is hidden, or less
VISIBLE, HIDDEN, ADDED = "visible", "hidden", "added"  # true where seen, true where not, minus infinity where not


class MaskUsedError(ValueError, AttributeError):
    """A model wants more of a mask than to apply it to scores; an AttributeError too, for `hasattr`."""


@dataclass(frozen=True, slots=True)
class Mask:
    """What a causal mask lets a query see.

    window  the last keys, 0 for all; -n: those of its chunk of n
    wrong   what is asked for is not that; said where it is applied, for some models ask for masks that they do not use
    says    what its elements would be: VISIBLE, HIDDEN or ADDED
    tokens  rows and columns
    slopes_H  of ALiBi that a model adds to its mask (Falcon)
    """

    window: int = 0
    wrong: str = ""
    says: str = field(default=VISIBLE, compare=False)
    tokens: Any = field(default=0, compare=False)
    device: torch.device | None = field(default=None, compare=False)
    slopes_H: torch.Tensor | None = field(default=None, compare=False)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype | None:
        return None if self.says is ADDED else torch.bool

    def applied(self) -> int:
        """Return the window. Raises ValueError for a mask that is not causal."""
        if self.wrong or self.slopes_H is not None:
            raise ValueError(self.wrong or "a mask with ALiBi is served by scaled_dot_product_attention alone")
        return self.window

    @property
    def shape(self) -> torch.Size:
        return torch.Size((1, 1, self.tokens, self.tokens))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __getitem__(self, item: Any) -> Mask:
        return self  # the part that belongs to these queries and keys

    def to(self, *args: Any, dtype: Any = None, **options: Any) -> Mask:
        if self.says is ADDED and torch.bool in (*args, dtype):  # true where it is not zero
            return replace(self, says=HIDDEN)
        return self

    def __invert__(self) -> Mask:
        if self.says is ADDED:
            return self._refuse("__invert__")
        return replace(self, says=HIDDEN if self.says is VISIBLE else VISIBLE)

    def __ne__(self, other: object) -> Any:
        return not self == other if isinstance(other, Mask) else self._refuse("!=")

    def check_added(self, seen: float | None, hidden: Any) -> None:
        """Raise MaskUsedError unless what is added is 0 where a key is seen, and next to minus infinity elsewhere."""
        if self.says is not VISIBLE or seen != 0 or not isinstance(hidden, float) or hidden > LOWEST:
            self._refuse("where")

    def __lt__(self, bound: Any) -> Mask:
        """Return where it hides a key: what is added elsewhere is no less than -1."""
        return replace(self, says=HIDDEN) if self.says is ADDED and bound == -1 else self._refuse("<")

    def _refuse(self, name: str) -> Any:
        raise MaskUsedError(
            f"the model's own code computes with its mask ({name}), which is not served; wanted it handed on, or"
            " applied to scores"
        )

    def __getattr__(self, name: str) -> Any:
        self._refuse(name)

    def __add__(self, other: Any) -> Any:
        return NotImplemented if hasattr(other, "masked_fill") else self._refuse("+")

    def __mul__(self, other: Any) -> Any:
        self._refuse("*")

    __radd__ = __and__ = __rand__ = __or__ = __ror__ = __rmul__ = __sub__ = __rsub__ = __mul__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for other in args:  # what it is applied to decides
            if not isinstance(other, (cls, torch.Tensor)) and hasattr(type(other), "__torch_function__"):
                return type(other).__torch_function__(func, types, args, kwargs)
        return cls()._refuse(func.__name__)


def mask_of(function: Callable[..., Any], longest: int) -> Mask:
    """Return what a mask function of transformers lets queries see, where requests have `longest` tokens at most."""
    kinds = dict(_parts(function))
    chunk, other = kinds.get("chunk") or 0, [name for name in kinds if name not in ("causal", "window", "chunk")]
    wrong = ""
    window = kinds.get("window") or (-chunk if longest > chunk else 0)
    if longest > chunk > 0 and kinds.get("window"):
        wrong = f"attention in chunks and windows at once is not served; pass max_model_len={chunk}"
    if other or "causal" not in kinds:
        what = f"a mask by {', '.join(other)}" if other else "attention to later tokens"
        wrong = f"{what} is not served; wanted plain causal attention"
    return Mask(window, wrong)


def mask_in(table: torch.Tensor) -> Mask | None:
    """Return what a table (1, 1, N, N) of truth values that a module keeps lets queries see, or None for another."""
    if table.dim() != 4 or table.shape[:2] != (1, 1) or table.shape[2] != table.shape[3] or table.is_floating_point():
        return None
    seen = table[0, 0] != 0
    window = int(seen[-1].sum())
    band = torch.ones_like(seen).tril() & ~torch.ones_like(seen).tril(-window)
    return Mask(0 if window == len(seen) else window) if torch.equal(seen, band) else None


def _parts(function: Callable[..., Any]) -> Iterator[tuple[str, int | None]]:
    """Yield the kinds of masks whose intersection a mask function of transformers is, windows and chunks with sizes."""
    name = function.__qualname__.partition(".")[0]
    held = {} if function.__closure__ is None else dict(zip(function.__code__.co_freevars, function.__closure__))  # noqa: B905
    if name == "causal_mask_function":
        yield "causal", None
    elif name == "and_masks":
        for part in held["mask_functions"].cell_contents:
            yield from _parts(part)
    elif name == "remap_positions_for_packed_sequence":  # positions within each request: they are so here
        yield from _parts(held["mask_function"].cell_contents)
    elif name == "packed_sequence_mask_function":  # of its own request's keys only: so it is here
        return
    elif name == "sliding_window_overlay":
        yield "window", int(held["sliding_window"].cell_contents)
    elif name == "chunked_overlay":
        yield "chunk", int(held["chunk_size"].cell_contents)
    else:
        yield function.__qualname__, None
