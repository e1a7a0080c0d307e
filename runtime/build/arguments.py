"""Arguments by name: one that a function does not have is refused with the nearest that it has."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

Called = TypeVar("Called", bound=Callable[..., Any])
Record = TypeVar("Record")


def refuse_unknown(given: Iterable[str], known: Collection[str], instead: Mapping[str, str], what: str) -> None:
    """Raise ValueError for a name that is not known: what stands instead of it, the nearest known one, or all."""
    for name in given:
        if name not in known:
            hint = nearest(str(name), known) or f"wanted one of {', '.join(sorted(known))}"
            raise ValueError(f"there is no {what} {name!r}; {instead.get(name, hint)}")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the question whether one of the names that there are was meant, None where none is like this one."""
    close = difflib.get_close_matches(name, [*known], 1, cutoff=0.7)
    return f"did you mean {close[0]}?" if close else None


def options_of(kind: type[Record], given: Record | Mapping[str, Any] | None, option: str) -> Record | None:
    """Return the dataclass that an option is: given so, or as a mapping of its fields, as vLLM takes it; or None.

    Raises ValueError for what is neither, or a field that there is not.
    """
    if given is None or isinstance(given, kind):
        return given
    known = [*inspect.signature(kind).parameters]
    if not isinstance(given, Mapping):
        raise ValueError(f"{option}={given!r}, wanted a mapping with options of {', '.join(known)}")
    refuse_unknown(given, known, {}, f"option of {option}:")
    return kind(**given)


def named_arguments(**instead: str) -> Callable[[Called], Called]:
    """Make a function, or a dataclass's constructor, refuse unknown keyword arguments by name.

    instead  an argument that other libraries have -> what there is here
    """

    def checked(called: Called) -> Called:
        target = called.__init__ if isinstance(called, type) else called  # type: ignore[misc]
        known = [name for name in inspect.signature(target).parameters if name != "self"]
        what = f"argument of {called.__qualname__}:"

        @functools.wraps(target)
        def call(*args: Any, **kwargs: Any) -> Any:
            refuse_unknown(kwargs, known, instead, what)
            return target(*args, **kwargs)

        if isinstance(called, type):
            called.__init__ = call  # type: ignore[misc]
            return called
        return call  # type: ignore[return-value]

    return checked
