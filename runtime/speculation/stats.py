"""What became of guesses."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class DraftStats:
    """What a drafter guessed: for how many sequences, their tokens, those that stood, and these by position.

    num_forced_tokens  guesses of grammars that stood
    active, gain  whether guessing pays, and tokens a second with it of those without, at the size of the last step
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)
    num_forced_tokens: int = 0
    active: bool = True
    gain: float = 1.0
