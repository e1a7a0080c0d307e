"""A growing list of token ids as growing text, in time that does not depend on its length, with stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from .tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # what an incomplete character decodes to
_PROMPT_TAIL = 6  # ids of the prompt that give the first output token its spacing


class Detokenizer:
    """Text of one output. Text once shown never changes, and never holds a part of a stop string that may complete.

    The last ids are decoded together in a window, for a character may span tokens and spacing depends on neighbours;
    the window moves on whenever it ends with a whole character.
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
        self._window = [t for t in prompt_ids[-_PROMPT_TAIL:] if t not in self._hidden]
        self._num_old = len(self._window)  # ids of the window that were whole when it last moved
        before = self._decode(self._window)
        if before.endswith(_REPLACEMENT):  # the prompt ends inside a character: the output stands alone
            self._window, self._num_old, before = [], 0, ""
        self._num_sent = len(before)  # characters of the decoded window that are in the text, or before it

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
        known = decoded.rstrip(_REPLACEMENT)  # all of them: byte-fallback decoders give one for each byte
        new = known[self._num_sent :]
        if new and known == decoded:
            del self._window[: self._num_old]
            self._num_old = len(self._window)
            self._num_sent = len(self._decode(self._window))
        else:
            self._num_sent += len(new)
        return self._extend(new, may_stop)

    def finish(self, *, may_stop: bool = True) -> str | None:
        """End the text with what was held back; return the stop string that this completes, if any."""
        if self._ended:
            return None
        found = self._extend(self._decode(self._window)[self._num_sent :], may_stop)
        self._ended = True
        return found

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
