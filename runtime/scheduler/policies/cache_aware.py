"""Fewest uncached prompt tokens first, with aging: requests that share a prefix run while it is in the cache.

SGLang's longest-prefix-match order has no aging, and its shared prefixes can keep a stranger waiting for ever. Here the
bound is that of `predictive` with uncached prompt tokens as work: i is overtaken only by those that arrive before
t_i + u_i / AGING, u_i being its uncached tokens when it arrived.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import Keys, Policy

if TYPE_CHECKING:
    from seamwise.runtime.scheduler.view import Rows, View

AGING = 0.02  # uncached tokens forgiven for each token that others were given


class CacheAware(Policy):
    """Uncached tokens less age."""

    name = "cache_aware"
    reads_cached = True

    def admit(self, view: View, rows: Rows) -> Keys:
        return (rows.prompt - rows.cached + AGING * rows.arrived,)

    def serve(self, view: View, rows: Rows) -> Keys:
        return ()
