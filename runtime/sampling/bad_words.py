"""Bad words as the token ids that would write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def tokens_of_words(words: Sequence[str], encode: Callable[[str], Sequence[int]]) -> list[list[int]]:
    """Return the token ids of each word, at the start of a text and after a space where those are others.

    `encode` adds no special tokens. Raises ValueError for a word that has no tokens.
    """
    found: list[list[int]] = []
    for word in words:
        plain, spaced = list(encode(word.lstrip())), list(encode(" " + word.lstrip()))
        if not plain:
            raise ValueError(f"bad_words: {word!r} has no tokens")
        found.append(plain)
        # "▁" and the word's own tokens write the same text; only a word that begins otherwise is another one.
        if len(spaced) == len(plain) and spaced[0] != plain[0]:
            found.append(spaced)
    return found
