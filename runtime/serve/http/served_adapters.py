"""Adapters that a server serves under names of their own, beside the model that they change."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

from seamwise.runtime.engine.lora_request import LoRARequest


class ServedAdapters:
    """Names to adapters. A number belongs to one content for good: a name that is loaded anew gets another.

    modules  NAME=DIRECTORY each, served from the start
    """

    def __init__(self, modules: Iterable[str] = ()) -> None:
        self._numbers = itertools.count(1)
        self.by_name: dict[str, LoRARequest] = {}
        for text in modules:
            name, mark, path = text.partition("=")
            if not (name and mark and path):
                raise ValueError(f"lora_modules: {text!r}, wanted NAME=DIRECTORY")
            if name in self.by_name:
                raise ValueError(f"lora_modules: the name {name!r} comes twice; give each adapter its own")
            self.by_name[name] = self.numbered(name, path)

    def numbered(self, name: str, path: str) -> LoRARequest:
        """Return an adapter with a number that none has had. Raises ValueError for no directory."""
        if not Path(path).is_dir():
            raise ValueError(f"adapter {name!r}: {path!r} is no directory; wanted one with adapter_config.json")
        return LoRARequest(name, next(self._numbers), path)
