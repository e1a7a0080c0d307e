"""Which layers' weights a checkpoint stores how: what every reader of a `quantization_config` gives, and checks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from seamwise.model_defs.hf_config import Reader
from seamwise.passes import Scheme

from .published_layouts import Published


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How the weights of the layers that a target names are stored.

    targets  names of modules, "re:" and a pattern that their start matches, or names of classes
    stored, scale  how the names of what is stored and of its scale end, after the weight's
    has_zero, has_offset  whether there are zero points, or offsets
    """

    targets: tuple[str, ...]
    scheme: Scheme
    stored: str = ""
    scale: str = "_scale"
    has_zero: bool = False
    has_offset: bool = False
    quantizes_input: bool = False
    has_input_scale: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Rules, of which the most specific that names a layer holds; and what is ignored, named alike.

    has_kv_scales  whether each attention has k_scale and v_scale, for a KV cache of float8_e4m3fn
    holds_kv_scales  whether it has them though its configuration asks for no such cache
    published  how files hold that, where their layout is another
    """

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    has_kv_scales: bool = False
    holds_kv_scales: bool = False
    published: Published | None = None


def read_block(read: Reader, name: str) -> tuple[int, int]:
    """Return the rows and columns of a block of weights. Raises ValueError for what is none."""
    given = read.raw.get(name)
    if not isinstance(given, list) or len(given) != 2 or any(type(n) is not int or n < 1 for n in given):
        raise ValueError(f"{read.where}: {name} is {given!r}, wanted the rows and columns of a block, like [128, 128]")
    return given[0], given[1]


def read_names(read: Reader, given: Any) -> list[str]:
    """Return names or patterns of modules. Raises ValueError for what are none."""
    if not isinstance(given, list) or not all(isinstance(n, str) for n in given):
        raise ValueError(f"{read.where}: {given!r} is not a list of names or patterns of modules")
    for name in given:
        try:
            re.compile(name.removeprefix("re:"))
        except re.error as error:
            raise ValueError(f"{read.where}: {name!r} is not a pattern of modules: {error}") from error
    return given


def refuse_unknown(read: Reader, known: set[str]) -> None:
    """Raise ValueError for options that are not known, for they would be ignored."""
    if unknown := sorted({*read.raw} - known):
        raise ValueError(f"{read.where}: {', '.join(unknown)} would be ignored; wanted only {', '.join(sorted(known))}")
