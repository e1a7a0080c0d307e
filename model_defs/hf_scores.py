"""Attention that a model's own code spells out: products of queries and keys, a mask, a softmax, products with values.

Nothing of it is computed. The product of all queries with all keys is an object that notes what the code does with it
(scales it, adds a mask or ALiBi); the softmax's product with the values is then one call of attention. Any other use is
refused in words, so what is served is what was written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .hf_masks import ADDED, HIDDEN, LOWEST, VISIBLE, Mask

PRODUCTS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__}
SUMMED_PRODUCTS = {torch.baddbmm, Tensor.baddbmm}
# Functions of torch and what they are called here; whatever else is given scores is refused.
_NAMES = {
    "matmul": "matmul", "bmm": "matmul", "softmax": "softmax", "dropout": "dropout", "where": "where", "max": "bounded",
    "maximum": "bounded", "add": "__add__", "radd": "__add__", "mul": "__mul__", "rmul": "__mul__", "div":
    "__truediv__", "masked_fill": "masked_fill",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Alibi:
    """slope · key's position, for every head: a row of what is added to scores. As a value it may only be added."""

    slopes_H: Tensor
    tokens: Any

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.slopes_H.shape[0], 1, self.tokens))

    def size(self, dim: int) -> Any:
        return self.shape[dim]

    def view(self, *_: Any) -> Alibi:
        return self

    reshape = repeat = to = __getitem__ = view

    def __mul__(self, positions: Any) -> Alibi:
        return self

    def __truediv__(self, by: float) -> Alibi:
        return Alibi(self.slopes_H / by, self.tokens)

    def baddbmm(self, batch1: Tensor, batch2: Tensor, beta: float = 1.0, alpha: float = 1.0) -> Any:
        products: Any = torch.baddbmm(torch.zeros(()), batch1, batch2, alpha=alpha)
        return products + Alibi(self.slopes_H * beta, self.tokens)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.masked_fill and isinstance(args[1], Mask) and args[1].says is HIDDEN and args[2] <= LOWEST:
            return replace(args[1], says=ADDED, slopes_H=args[0].slopes_H)
        raise ValueError(f"the model's own code computes with ALiBi ({func.__name__}), which is not served")


@dataclass(frozen=True, slots=True)
class Scores:
    """Products of queries (…, H, T, E) and keys (…, K, E, T) of a step's row of tokens, and what was done with them.

    attend   computes attention from these, once they are weights, and values (…, K, T, V): (…, H, T, V)
    scale    what the products were multiplied by, beside what the queries were
    mask     None: none yet
    slopes   of ALiBi
    weights  whether a softmax was taken
    shape    as the model's code sees it
    """

    queries: Tensor
    keys: Tensor
    attend: Callable[[Scores, Tensor], Tensor]
    shape: torch.Size
    dtype: torch.dtype
    scale: float = 1.0
    mask: Mask | None = None
    slopes_H: Tensor | None = None
    weights: bool = field(default=False)

    @property
    def device(self) -> torch.device:
        return self.queries.device

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def view(self, *shape: Any) -> Scores:
        dims = shape if len(shape) > 1 else tuple(shape[0])
        return replace(self, shape=torch.Size((*dims[:-2], *self.shape[-2:])))

    reshape = view

    def to(self, kind: Any) -> Scores:
        return replace(self, dtype=kind) if isinstance(kind, torch.dtype) else self

    type = to

    def float(self) -> Scores:
        return self.to(torch.float32)

    def __mul__(self, by: Any) -> Scores:
        if self.weights or not isinstance(by, (int, float, Tensor)) or (isinstance(by, Tensor) and by.dim()):
            return self._refuse("*")
        slopes_H = None if self.slopes_H is None else self.slopes_H * by
        if isinstance(by, Tensor):
            return replace(self, queries=self.queries * by, slopes_H=slopes_H)
        return replace(self, scale=self.scale * by, slopes_H=slopes_H)

    def __truediv__(self, by: Any) -> Scores:
        return self * (1 / by)

    def __add__(self, other: Any) -> Scores:
        if isinstance(other, Alibi) and self.slopes_H is None and not self.weights:
            return replace(self, slopes_H=other.slopes_H)
        return self._masked(other, ADDED, "+")

    __rmul__, __radd__ = __mul__, __add__

    def masked_fill(self, mask: Any, value: Any) -> Scores:
        return self._masked(mask, HIDDEN, "masked_fill")

    def where(self, mask: Any, other: Any) -> Scores:
        return self._masked(mask, VISIBLE, "where")

    def bounded(self, least: Any) -> Scores:
        """Return the same: all that is less is what the mask hides."""
        return self if self.mask is not None and not self.weights else self._refuse("max")

    def softmax(self, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Scores:
        if self.weights or self.mask is None or dim not in (-1, len(self.shape) - 1):
            raise ValueError("attention to later tokens is not served; wanted scores with a causal mask")
        return replace(self, weights=True, dtype=dtype or self.dtype)

    def dropout(self, p: Any = 0.5, training: bool = True, inplace: bool = False) -> Scores:
        return self._refuse("dropout") if training and p else self

    def matmul(self, values: Tensor) -> Tensor:
        return self.attend(self, values) if self.weights else self._refuse("matmul")

    __matmul__ = bmm = matmul

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        scores = next((a for a in args if isinstance(a, Scores)), None)
        name = _NAMES.get(func.__name__.strip("_"))
        if name in ("__add__", "__mul__", "where") and args[1] is scores:  # commutative, or with the mask before
            args = (scores, args[0], *args[2:])
        if scores is None or name is None or args[0] is not scores:
            raise ValueError(f"the model's own code gives its attention's scores to {func.__name__}: not served")
        return getattr(scores, name)(*args[1:], **(kwargs or {}))

    def _masked(self, mask: Any, says: str, name: str) -> Scores:
        if self.weights or not isinstance(mask, Mask) or mask.says is not says:
            return self._refuse(name)
        windows = {w for m in (self.mask, mask) if m is not None and (w := m.applied())}
        if min(windows, default=0) < 0 and len(windows) > 1:
            return self._refuse("+ of two masks, one of chunks")
        return replace(self, mask=Mask(min(windows, default=0)))

    def _refuse(self, name: str) -> Any:
        what = "the softmax of its attention's scores" if self.weights else "its attention's scores"
        raise ValueError(f"the model's own code computes with {what} ({name}), which is not served")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse(name)


def is_square(queries: Any, keys: Any, tokens: Any) -> bool:
    """Return whether a product of these is one of all tokens with all tokens; decides nothing about symbolic sizes.

    One of vectors of a single element is not: a rotary embedding multiplies frequencies with positions so.
    """
    if not (isinstance(queries, Tensor) and isinstance(keys, Tensor) and min(queries.dim(), keys.dim()) > 2):
        return False
    if statically_known_true(queries.shape[-1] == 1):
        return False
    return statically_known_true(queries.shape[-2] == tokens) and statically_known_true(keys.shape[-1] == tokens)
