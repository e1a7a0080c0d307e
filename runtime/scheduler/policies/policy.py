"""The base of all policies."""

from __future__ import annotations

import numpy as np

from seamwise.runtime.scheduler.view import Rows, View

Keys = tuple[np.ndarray, ...]


class Policy:
    """The base of all policies: only `admit` must be defined.

    reads_cached  whether rows.cached is to be kept up to date for waiting sequences, some of them each step
    """

    name = ""
    reads_cached = False

    def admit(self, view: View, rows: Rows) -> Keys:
        """Return the keys of waiting sequences: the lowest starts first, and none starts past another."""
        raise NotImplementedError(f"{type(self).__name__} has no admit(view, rows)")

    def serve(self, view: View, rows: Rows) -> Keys:
        """Return the keys of running sequences: the lowest is given tokens and blocks first."""
        return self.admit(view, rows)

    def evict(self, view: View, rows: Rows) -> Keys:
        """Return the keys of running sequences: the highest gives its blocks back first.

        The order must end in that of `serve`: whoever is served first must never be the only one to go.
        """
        return self.serve(view, rows)

    def cost(self, num_prompt: np.ndarray, num_output: np.ndarray) -> np.ndarray:
        """Return what tenants are charged for tokens of prompts, when they start, and of outputs."""
        return num_prompt + num_output
