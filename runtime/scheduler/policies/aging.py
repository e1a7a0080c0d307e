"""The least work first, with aging: the order that `predictive` and `cache_aware` share, and its bound.

Age is measured in tokens that the engine has scheduled since a request came, so that the bound does not depend on the
machine.

Starvation bound: i is overtaken by a later j only if w_j + aging · t_j < w_i + aging · t_i, that is only by those that
arrive before t_i + w_i / aging, w being the work and t the clock at arrival.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from seamwise.runtime.scheduler.view import Rows

    from . import Keys


def least_work(work: np.ndarray, rows: Rows, aging: float) -> Keys:
    """Return keys: (n,) work less age; `aging` is what each token that others were given takes off.

    The clock itself is in every key alike, so it is left out.
    """
    return (work + aging * rows.arrived,)
