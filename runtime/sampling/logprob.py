"""A token's log probability, as outputs carry it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Logprob:
    """Natural-log probability of a token under the raw distribution, its rank (1 is the most likely), its text.

    decoded_token is None with detokenize=False.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None
