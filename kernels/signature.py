"""What an op's parameters say of its tensors, and the check of it that runs before any provider does.

A name ends in its tensor's sizes, a letter each: `x_TD, cos_TR`. Equal letters are equal sizes, tensors lie on one
device, and kernels read a last dimension that is contiguous. What a name cannot say is declared beside the meaning:

    "int32"          the dtype that kernels read; other integers (for a float other floats) are left to the meaning
    "uint8!"         a dtype that nothing else stands for
    "*T 2*I"         *: any number of dimensions, none among them; a size may be written in letters and integers
    "N K [P D]"      dimensions in brackets are contiguous together, for kernels
    "N 1|K"          either size
    "N 1 or 1 1"     either shape

A letter means the same in every op where it can: T tokens, D a model's columns, R requests or a LoRA's rank or the
columns that turn by rope, H query heads, K key heads, chosen experts, or the inner size of a product whose columns are
N, P tokens a block of a cache, E experts, I an MLP's columns, G groups that share a scale, V a vocabulary, C a latent.

What breaks the signature is a ValueError, whatever the provider. A layout that kernels do not read is left to the
meaning, and so are symbolic sizes that are not known to be equal.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

_MEMO = 4096  # verdicts kept by an op; a step of other sizes is another


class WrongArguments(ValueError):
    """Arguments that an op's signature or its limits refuse."""


def cdiv(size: int, part: int) -> int:
    """Return ⌈size / part⌉."""
    return -(-size // part)


def blocks(size: int, block: int) -> int:
    """Return how many blocks of `block` a size has; 0 is one block of all."""
    return cdiv(size, block) if block else 1


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor: its shapes, any of which it may have, how many last dimensions are contiguous, and its dtypes."""

    name: str
    shapes: tuple[tuple[str, ...], ...]
    dense: int
    dtypes: tuple[torch.dtype, ...]
    exact: bool

    @classmethod
    def parse(cls, name: str, text: str) -> Parameter:
        """Read a declaration. Raises ValueError when neither it nor the name says a shape."""
        suffix = re.search(r"_([A-Z]+)$", name)
        words = text.split()
        found = [getattr(torch, w, None) for w in words[-1].rstrip("!").split("|")] if words else []
        dtypes = tuple(d for d in found if isinstance(d, torch.dtype))
        shape = " ".join(words[:-1] if dtypes else words) or " ".join(suffix[1] if suffix else "")
        if not shape:
            raise ValueError(f"the name {name} ends in no sizes; declare them, as args={{{name!r}: 'T D'}}")
        dense = len(shape[shape.index("[") :].split()) if "[" in shape else 1
        shapes = tuple(tuple(s.split()) for s in re.sub(r"[\[\]]", "", shape).split(" or "))
        return cls(name, shapes, dense, dtypes, text.endswith("!"))

    @property
    def label(self) -> str:
        return re.sub(r"_[A-Z][A-Z0-9]*$", "", self.name)

    def __str__(self) -> str:
        shapes = (", ".join(s).replace("*", "·").replace("|", " or ").lstrip("·") for s in self.shapes)
        every = " or ".join(f"({s},)" if "," not in s else f"({s})" for s in shapes)
        return f"{self.label}: {every}"

    def has(self, dtype: torch.dtype) -> bool:
        """Return whether the op is defined for a dtype."""
        if self.exact or not self.dtypes:
            return not self.dtypes or dtype in self.dtypes
        return dtype.is_floating_point == self.dtypes[0].is_floating_point and dtype != torch.bool

    def loose(self, x: Tensor) -> str | None:
        """Return why kernels do not read a tensor, or None."""
        if self.dtypes and x.dtype not in self.dtypes:
            return f"{self.label} must be {_either(self.dtypes)}, got {x.dtype}"
        rows = self.shapes[0][0][0] == "*"
        if rows and len(self.shapes[0]) > 1 and _known(x.shape[-1] == 0):
            return f"{self.label} has rows of no columns"
        count = x.dim() if rows and x.dim() != len(self.shapes[0]) else self.dense
        if _contiguous(x, count):
            return None
        where = (
            "" if count == x.dim() else f" in its last {count} dimensions" if count > 1 else " in its last dimension"
        )
        return f"{self.label} must be contiguous{where}, its strides are {x.stride()}"


class Signature:
    """All tensors of an op and what its other arguments allow them. `judge(*args)` is the check, see `_judged`."""

    def __init__(
        self, meaning: Callable[..., Any], declared: Mapping[str, str], limits: Callable[..., str | None]
    ) -> None:
        self.op, self.limits = meaning.__name__, limits
        self.arguments = list(inspect.signature(meaning).parameters.values())
        tensors = [a.name for a in self.arguments if "Tensor" in str(a.annotation)]
        if unknown := [name for name in declared if name not in tensors]:
            raise ValueError(f"{self.op} has no tensor {unknown[0]!r}; it has: {', '.join(tensors)}")
        self.tensors = {name: Parameter.parse(name, declared.get(name, "")) for name in tensors}
        self.judge = self._remembering()

    def _remembering(self) -> Callable[..., str | None]:
        """Return `_judged` with a memory, as text written once because every eager call waits for it."""
        names = ", ".join(a.name for a in self.arguments)
        facts = {n: f"{n} is None or ({n}.shape, {n}.stride(), {n}.dtype, {n}.device)" for n in self.tensors}
        lists = [a.name for a in self.arguments if "list[" in str(a.annotation)]
        facts |= {n: f"{n} is None or (*{n},)" for n in lists}
        key = ", ".join(facts.get(a.name, a.name) for a in self.arguments)
        text = f"""def judge({names}):
            try:
                return known[{key},]
            except KeyError:
                return remember(({key},), judged({names}))
            except TypeError:  # symbolic sizes
                return judged({names})
        """
        known: dict[Any, str | None] = {}

        def remember(key: Any, verdict: str | None) -> str | None:
            if len(known) >= _MEMO:
                known.clear()
            known[key] = verdict
            return verdict

        space = {"known": known, "remember": remember, "judged": self._judged}
        exec(text, space)
        judge: Any = space["judge"]
        judge.__defaults__ = tuple(a.default for a in self.arguments if a.default is not a.empty)
        return judge

    def _judged(self, *args: Any) -> str | None:
        """Return why no kernel reads these arguments, or None. Raises WrongArguments for what the op does not take."""
        sizes = self.check(*args)
        return sizes.unsure or next((reason for p, x in sizes.given.items() if (reason := p.loose(x))), None)

    def check(self, *args: Any) -> _Sizes:
        """Return the sizes of a call. Raises WrongArguments for what the op does not take."""
        named = {a.name: a.default for a in self.arguments}
        named |= zip(named, args, strict=False)
        given = {p: named[name] for name, p in self.tensors.items() if named[name] is not None}
        first = next(iter(given))
        for p, x in given.items():
            if not p.has(x.dtype):
                raise WrongArguments(f"{self.op}: {p.label} is {x.dtype}, wanted {_either(p.dtypes)}")
            if x.device != given[first].device:
                there, here = x.device, given[first].device
                raise WrongArguments(
                    f"{self.op}: {p.label} is on {there} but {first.label} is on {here}; move one of them"
                )
        sizes = _Sizes(self.op, named, given)
        if reason := self.limits(*args):
            raise WrongArguments(f"{self.op}: {reason}")
        return sizes


class _Sizes:
    """What each letter stands for in one call: the size of the first tensor that has it alone, or as a multiple."""

    def __init__(self, op: str, named: Mapping[str, Any], given: Mapping[Parameter, Tensor]) -> None:
        self.op, self.given = op, given
        self.known = {"cdiv": cdiv, "blocks": blocks, **named}
        self.owner: dict[str, tuple[Parameter, int]] = {}
        self.unsure: str | None = None
        for p, x in given.items():
            self.rank(p, x)
        for bind in (self.multiple, self.letter):
            for p, at, size, word in self.every():
                bind(p, at, size, word)
        for p, x in given.items():
            self.compare(p, x)

    def every(self) -> Iterator[tuple[Parameter, int, Any, str]]:
        for p, x in self.given.items():
            if len(p.shapes) == 1:
                yield from ((p, at, size, word) for at, (size, word) in enumerate(self.sizes(p.shapes[0], x)))

    @staticmethod
    def sizes(words: Sequence[str], x: Tensor) -> Iterator[tuple[Any, str]]:
        """Yield each size of a tensor with its word; the leading dimensions are one, a tuple."""
        last = len(words) - 1
        for at, word in enumerate(words):
            yield (x.shape[: x.dim() - last] if word[0] == "*" else x.shape[at - last - 1]), word.lstrip("*")

    def rank(self, p: Parameter, x: Tensor) -> None:
        if not any(x.dim() == len(s) or (s[0][0] == "*" and x.dim() >= len(s) - 1) for s in p.shapes):
            raise WrongArguments(f"{self.op}: {p.label} has shape {tuple(x.shape)}, wanted {p}")

    def letter(self, p: Parameter, at: int, size: Any, word: str) -> None:
        if re.fullmatch("[A-Z]", word) and word not in self.known:
            self.known[word], self.owner[word] = size, (p, at)

    def multiple(self, p: Parameter, at: int, size: Any, word: str) -> None:
        if (found := re.fullmatch(r"(\d+)\*([A-Z])", word)) and found[2] not in self.known:
            self.known[found[2]] = size // int(found[1])

    def compare(self, p: Parameter, x: Tensor) -> None:
        """Hold every size against its word; of several shapes one must fit."""
        if len(p.shapes) > 1:
            alike = (s for s in p.shapes if len(s) == x.dim())
            if not any(all(self.same(n, w) is not False for n, w in self.sizes(s, x)) for s in alike):
                wanted = " or ".join(str(tuple(self.meant(w) for w in s)) for s in p.shapes)
                self.refuse(f"{p.label} has shape {tuple(x.shape)}, wanted {wanted}", *self.given)
            return
        for at, (size, word) in enumerate(self.sizes(p.shapes[0], x)):
            same, got = self.same(size, word), f"{p.label} has {_count(p, at, size)}"
            if same is None:
                self.unsure = f"{got}, not known to be {word}"
            if same is not False:
                continue
            if word in self.owner:
                other, there = self.owner[word]
                self.refuse(f"{got} but {other.label} has {_count(other, there, self.known[word])}", other, p)
            if (multiple := re.fullmatch(r"(\d+)\*[A-Z]", word)) and size % int(multiple[1]):
                self.refuse(f"{got}, wanted a multiple of {multiple[1]}", p)
            words = [w if w.isdigit() else f"{w.replace('*', '·')} = {self.meant(w)}" for w in word.split("|")]
            self.refuse(f"{got}, wanted {' or '.join(words)}", *self.given)

    def refuse(self, why: str, *shown: Parameter) -> NoReturn:
        raise WrongArguments(f"{self.op}: {why} ({', '.join(map(str, dict.fromkeys(shown)))})")

    def meant(self, word: str) -> Any:
        return eval(word, {}, self.known)

    def same(self, size: Any, word: str) -> bool | None:
        """Return whether a size is what a word stands for; None where that is not known."""
        wanted = [self.meant(w) for w in word.split("|")]
        if any(size is w or known_equal(size, w) for w in wanted):
            return True
        return False if all(known_unequal(size, w) for w in wanted) else None


def known_equal(a: Any, b: Any) -> bool:
    """Return whether sizes, or tuples of them, are equal for every value of the symbols in them."""
    if isinstance(a, tuple) or isinstance(b, tuple):
        return len(a) == len(b) and all(map(known_equal, a, b))
    return _known(a == b)


def known_unequal(a: Any, b: Any) -> bool:
    """Return whether sizes, or tuples of them, differ for every value of the symbols in them."""
    if isinstance(a, tuple) or isinstance(b, tuple):
        return len(a) != len(b) or any(map(known_unequal, a, b))
    return _known(a != b)


def _known(condition: Any) -> bool:
    """Return whether a condition holds for every value of the symbols in it."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import, and seldom needed

    return bool(statically_known_true(condition))


def _contiguous(x: Tensor, count: int) -> bool:
    """Return whether the last `count` dimensions lie together."""
    if count == x.dim() and all(isinstance(n, int) for n in x.shape):
        return x.is_contiguous()  # asked of symbolic sizes, it would hold them to what they are now
    step: Any = 1
    for size, stride in list(zip(x.shape, x.stride(), strict=True))[: -count - 1 : -1]:
        if not (_known(size == 1) or _known(stride == step)):
            return False
        step = step * size
    return True


def _count(p: Parameter, at: int, size: Any) -> str:
    """Say a size as what it counts."""
    last = len(p.shapes[0]) - 1
    if isinstance(size, tuple):
        return f"{size[0]} rows" if len(size) == 1 else f"{tuple(size)} in front of its columns"
    if not last:
        return f"{size} elements"
    return f"{size} columns" if at == last else f"{size} as {p.shapes[0][at]}" if at else f"{size} rows"


def _either(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(map(str, dtypes))
