"""numpy's and torch's numbers as Python's, in a record of options: callers compute them, checks and JSON want ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any


def make_plain(record: Any) -> None:
    """Replace, in a frozen dataclass, every number and array of numpy or torch by Python's numbers and lists."""
    for field in fields(record):
        got = getattr(record, field.name)
        if (plain := _plain(got)) is not got:
            object.__setattr__(record, field.name, plain)


def _plain(value: Any) -> Any:
    if isinstance(value, (str, bytes)) or value is None:
        return value
    if callable(as_list := getattr(value, "tolist", None)):
        return as_list()
    if isinstance(value, (list, tuple)) and any(hasattr(item, "tolist") for item in value):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping) and any(hasattr(item, "tolist") for pair in value.items() for item in pair):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return value
