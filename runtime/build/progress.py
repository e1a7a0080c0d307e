"""Progress of start-up: shown on a terminal, quiet everywhere else, and told to whoever listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from seamwise.compile.startup_times import Ledger

_listeners: list[Callable[[str], None]] = []


@contextmanager
def stages_told(listener: Callable[[str], None]) -> Iterator[None]:
    """Tell `listener` the name of each stage that a ledger of this process enters meanwhile."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def shown_ledger(label: str) -> Iterator[Ledger]:
    """Give a ledger whose stages show on stderr as they run, when that is a terminal."""
    from tqdm import tqdm

    with tqdm(desc=label, unit="stage", leave=False, disable=None) as bar:

        def entered(stage: str) -> None:
            bar.set_postfix_str(stage)
            bar.update()
            for listener in _listeners:
                listener(stage)

        yield Ledger(entered)
