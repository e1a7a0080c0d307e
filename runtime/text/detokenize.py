"""A growing list of token ids as growing text, in time that does not depend on its length, with stop strings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # what an incomplete character decodes to
# Ids of the prompt that give the first output token its spacing; more where they end inside a character, for bytes that
# SentencePiece falls back to decode only together with all that stand beside them.
_PROMPT_TAILS = (6, 24, 96)
_LONGEST = 4  # bytes of a character
_MOST_HELD = 64  # ids: what is no character by then is none


class Detokenizer:
    """Text of one output: what a decode of prompt and output has beyond the prompt's own.

    Text once shown never changes, and never holds a part of a stop string that may complete. The last ids are decoded
    together in a window, for a character may span tokens and spacing depends on neighbours; the window moves on
    whenever it ends with a whole character, and drops ids without which the rest decodes the same.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], *, stop: Sequence[str], skip_special_tokens: bool,
        include_stop: bool,
    ) -> None:  # fmt: skip
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._stop = tuple(stop)
        self._include = include_stop
        self._text = ""
        self._ended = False
        self._prompt_end = list(prompt_ids[-1:])
        # The window's first ids, so many, are whole characters of the prompt or shown: `known`. While those that follow
        # are the prompt's too, the start of a character, all of it decodes to `before`.
        self._window, self._before = self._tail(prompt_ids)
        self._num_old, self._known = self._whole(self._window, self._before)

    @property
    def text(self) -> str:
        """Text so far; until the end, without a tail that may yet become a stop string."""
        return self._text if self._ended else self._text[: len(self._text) - self._num_held()]

    def add(self, token: int, *, may_stop: bool = True) -> str | None:
        """Take one more id; return the stop string that it completes, if any (the text is then cut and at its end)."""
        if token in self._hidden or self._ended:
            return None
        self._window.append(token)
        decoded = self._decode(self._window)
        held = len(self._window) - self._num_old
        if decoded.endswith(_REPLACEMENT) and held < _MOST_HELD:
            return None
        new = added_text(decoded, before=self._before, known=self._known)
        rest = self._window[self._num_old :]
        alone = self._decode(rest)
        if alone and held < _MOST_HELD and decoded.endswith(alone):
            self._window, decoded = rest, alone
        elif len(self._window) >= _MOST_HELD:
            self._window = self._window[-_PROMPT_TAILS[0] :]
            decoded = self._decode(self._window)
        self._num_old, self._known, self._before = len(self._window), decoded, decoded
        return self._extend(new, may_stop)

    def finish(self, *, may_stop: bool = True) -> str | None:
        """End the text with what was held back; return the stop string that this completes, if any."""
        if self._ended:
            return None
        decoded = self._decode(self._window)
        if decoded.startswith(self._before):
            new = decoded[len(self._before) :]
        else:  # bytes that are no character take those before them along
            new = self._decode(self._window[self._num_old :])
        found = self._extend(new, may_stop)
        self._ended = True
        return found

    def texts_of(self, tokens: Iterable[int]) -> list[str]:
        """Return the text that each id would add here: with its space, as a whole character, "" for a part of one.

        Special tokens are spelled out.
        """
        window = self._window or self._prompt_end
        before = self._tokenizer.decode(window, skip_special_tokens=False)
        after = (self._tokenizer.decode([*window, token], skip_special_tokens=False) for token in tokens)
        return [added_text(one, before=before, known=self._known).rstrip(_REPLACEMENT) for one in after]

    def _tail(self, prompt_ids: Sequence[int]) -> tuple[list[int], str]:
        """Return the shortest end of a prompt that decodes to whole characters, or the longest, and its text."""
        for size in _PROMPT_TAILS:
            tail: list[int] = []
            for token in reversed(prompt_ids):
                if len(tail) == size:
                    break
                if token not in self._hidden:
                    tail.append(token)
            text = self._decode(tail[::-1])
            if len(tail) < size or not text.endswith(_REPLACEMENT):
                break
        return tail[::-1], text

    def _whole(self, ids: list[int], text: str) -> tuple[int, str]:
        """Return how many first ids decode to whole characters, and to which: all but those of a last, open one."""
        for count in range(len(ids), max(len(ids) - _LONGEST, 0) - 1, -1):
            known = text if count == len(ids) else self._decode(ids[:count])
            if not known.endswith(_REPLACEMENT):
                return count, known
        return len(ids), text

    def _extend(self, new: str, may_stop: bool) -> str | None:
        """Append text and cut it at the stop string that ends first in what is new, the longest of those."""
        scanned = len(self._text)
        self._text += new
        if not (may_stop and new):
            return None
        ends = []
        for stop in self._stop:
            start = self._text.find(stop, max(0, scanned - len(stop) + 1))
            if start >= 0:
                ends.append((start + len(stop), start, stop))
        if not ends:
            return None
        end, start, stop = min(ends)
        self._text = self._text[: end if self._include else start]
        self._ended = True
        return stop

    def _num_held(self) -> int:
        """Return the length of the longest tail that starts a stop string."""
        held = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._text)), held, -1):
                if self._text.endswith(stop[:size]):
                    held = size
                    break
        return held

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


def added_text(after: str, *, before: str, known: str) -> str:
    """Return what a decode has beyond that of fewer ids, `before`, whose characters were whole as far as `known`."""
    if after.startswith(before):
        return after[len(before) :]
    same = next((i for i, (old, new) in enumerate(zip(known, after, strict=False)) if old != new), len(known))
    return after[same:]
