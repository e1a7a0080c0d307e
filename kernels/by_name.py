"""Functions that name which of an op's parameters they read, as pytest's fixtures do, instead of repeating them all."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def by_name(op: Callable[..., Any], *functions: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of the op's arguments: the first true result of these functions, else the last one's, or None.

    Each is given the arguments that its parameters name; what a call leaves out is the op's default. Keyword-only
    parameters are a function's own, and one that takes *args gets every argument. Raises ValueError for a name that the
    op has not. The call is written once, as a lambda, because choosing a kernel waits for it: 0.1 us.
    """
    known = inspect.signature(op).parameters
    calls = [f"functions[{i}]({', '.join(_names(f, op.__name__, list(known)))})" for i, f in enumerate(functions)]
    call = eval(f"lambda {', '.join(known)}: {' or '.join(calls) or None}", {"functions": functions})
    call.__defaults__ = tuple(p.default for p in known.values() if p.default is not p.empty)
    return call


def _names(function: Callable[..., Any], op: str, known: list[str]) -> list[str]:
    own = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in own):
        return known
    named = [p.name for p in own if p.kind is p.POSITIONAL_OR_KEYWORD]
    if unknown := [name for name in named if name not in known]:
        what = getattr(function, "__qualname__", str(function))
        raise ValueError(f"{what}: {op} has no parameter {unknown[0]!r}; it has: {', '.join(known)}")
    return named
