"""A ledger of where start-up time went, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Ledger:
    """Seconds by stage, in the order the stages ran; a stage entered twice adds up. `entered` hears of each."""

    def __init__(self, entered: Callable[[str], None] = lambda stage: None) -> None:
        self.seconds: dict[str, float] = {}
        self._entered = entered

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._entered(name)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
