"""A tokenizer without a model: token t is written as a letter, some as several, one as half of a character."""

from __future__ import annotations

from collections.abc import Sequence

_TEXTS = ["a", "b", "c", "d", " ", "ab", "ba", "cc", "\n", "x"]
_HALF = 11  # two of them are one "é"


class FakeTokenizer:
    """Decodes ids of a small vocabulary. `broken` is an id that raises when it is decoded."""

    special_ids = frozenset({2})
    eos_id = None

    def __init__(self, broken: int | None = None) -> None:
        self.broken = broken

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [_TEXTS.index(letter) + 3 for letter in text]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        if self.broken in ids:
            raise KeyError(f"token {self.broken} is not in the vocabulary")
        parts, i = [], 0
        ids = [t for t in ids if not (skip_special_tokens and t in self.special_ids)]
        while i < len(ids):
            if ids[i] == _HALF:
                whole = ids[i : i + 2] == [_HALF, _HALF]
                parts.append("é" if whole else "\ufffd")
                i += 2 if whole else 1
                continue
            parts.append(_TEXTS[ids[i] % len(_TEXTS)])
            i += 1
        return "".join(parts)
