"""Progress on a terminal: what start-up is doing. Quiet everywhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from seamwise.compile.ledger import Ledger


@contextmanager
def shown_ledger(label: str) -> Iterator[Ledger]:
    """Give a ledger whose stages show on stderr as they run, when that is a terminal."""
    from tqdm import tqdm

    with tqdm(desc=label, unit="stage", leave=False, disable=None) as bar:

        def entered(stage: str) -> None:
            bar.set_postfix_str(stage)
            bar.update()

        yield Ledger(entered)
