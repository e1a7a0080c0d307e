"""What became of guesses."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class DraftStats:
    """What a drafter guessed: for how many sequences, their tokens, those that stood, and these by position.

    num_forced_tokens  guesses of grammars that stood; active: whether guessing pays, by the last step that could
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)
    num_forced_tokens: int = 0
    active: bool = True
