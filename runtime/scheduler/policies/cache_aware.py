"""Fewest uncached prompt tokens first, with aging: requests that share a prefix run while it is in the cache.

SGLang's longest-prefix-match order has no aging, and its shared prefixes can keep a stranger waiting for ever. Here the
bound is that of aging.py with the whole prompt as w_i: what is cached of it may be evicted while it waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import Keys, Policy
from .aging import least_work

if TYPE_CHECKING:
    from seamwise.runtime.scheduler.view import Rows, View

AGING = 0.02  # uncached tokens forgiven for each token that others were given


class CacheAware(Policy):
    """Work is what the cache does not hold of the prompt."""

    name = "cache_aware"
    reads_cached = True

    def admit(self, view: View, rows: Rows) -> Keys:
        return least_work(rows.prompt - rows.cached, rows, AGING)

    def serve(self, view: View, rows: Rows) -> Keys:
        return ()
