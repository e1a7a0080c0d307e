"""Hidden states of texts to one state each, over as many steps as a text is computed in.

A sum goes on row by row in float64 from where the step before left it, so a text's mean is the same in bits however it
is cut into chunks, and whatever else a step computes.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from seamwise.runtime.scheduler.commit import Step


class Pooling:
    """What is pooled of each slot until now: (S, D) float64, touched where steps run and nowhere else.

    kind  "LAST", "MEAN" or "CLS", as a Pooler's
    """

    def __init__(self, kind: str, num_slots: int, size: int) -> None:
        self.kind = kind
        self._states = np.zeros((0 if kind == "LAST" else num_slots, size))

    def rows(self, step: Step) -> np.ndarray:
        """Return the step's rows whose hidden states are pooled, in order, (L,)."""
        ends = step.counts.cumsum()
        if self.kind == "LAST":
            return ends[step.yields] - 1
        return (ends - step.counts)[step.firsts == 0] if self.kind == "CLS" else np.arange(ends[-1])

    def take(self, hidden_LD: Tensor, step: Step) -> np.ndarray:
        """Take those rows' states in; return (Y, D) float64: the pooled ones of texts that end in this step."""
        rows_LD = hidden_LD.double().cpu().numpy()
        if self.kind == "LAST":
            return rows_LD
        if self.kind == "CLS":
            self._states[step.slots[step.firsts == 0]] = rows_LD
            return self._states[step.slots[step.yields]]
        parts = np.split(rows_LD, step.counts.cumsum()[:-1])
        for slot, first, part in zip(step.slots.tolist(), step.firsts.tolist(), parts, strict=True):
            if first == 0:  # whoever had the slot before, or the same text that starts over
                self._states[slot] = 0
            for row in part:
                self._states[slot] += row
        return self._states[step.slots[step.yields]] / (step.firsts + step.counts)[step.yields, None]
