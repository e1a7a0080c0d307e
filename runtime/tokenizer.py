"""A model directory's tokenizer: the light one for text and ids, transformers' own for chat templates and callers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Tokenizer:
    """Encodes prompts and decodes outputs.

    tokenizer.json is read by the tokenizers library alone (0.1 s); transformers (1 s more) is imported only for a chat
    template, for get_tokenizer, or when a directory has no tokenizer.json.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._full: Any = None
        self._light: Any = None
        if (directory / "tokenizer.json").exists():
            from tokenizers import Tokenizer as Light

            try:
                self._light = Light.from_file(str(directory / "tokenizer.json"))
            except Exception as error:  # the library raises bare Exception for a file it cannot parse
                raise ValueError(f"{directory}/tokenizer.json: not a tokenizer: {error}") from error

    @property
    def full(self) -> Any:
        """The transformers tokenizer. Raises ValueError when the directory holds none."""
        if self._full is None:
            from transformers import AutoTokenizer

            try:
                self._full = AutoTokenizer.from_pretrained(self.directory)
            except (OSError, ValueError, KeyError) as error:
                raise ValueError(
                    f"{self.directory}: has no tokenizer transformers can load ({error}); pass tokenizer=, or"
                    ' prompts as {"prompt_token_ids": […]} with detokenize=False'
                ) from error
        return self._full

    def encode(self, text: str) -> list[int]:
        """Return ids with the special tokens the tokenizer adds by itself."""
        if self._light is None:
            return list(self.full.encode(text))
        return list(self._light.encode(text).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        if self._light is None:
            return str(self.full.decode(list(ids), skip_special_tokens=skip_special_tokens))
        return str(self._light.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], *, chat_template: str | None, add_generation_prompt: bool
    ) -> list[int]:
        """Return the ids of a conversation. Raises ValueError when the tokenizer has no chat template."""
        try:
            text = self.full.apply_chat_template(
                list(messages), chat_template=chat_template, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except ValueError as error:
            raise ValueError(f"chat: {error}") from error
        return list(self.full.encode(text, add_special_tokens=False))


class Detokenizer:
    """Turns a growing list of ids into text, piece by piece, and finds stop strings in it.

    Text is held back while it ends inside a character of several tokens, or could be the start of a stop string.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str], *, skip_special_tokens: bool, include_stop: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._skip = skip_special_tokens
        self._include = include_stop
        self._ids: list[int] = []
        self._context = 0  # ids from here on are decoded together, so that spacing is right
        self._read = 0  # ids before this one are in `text`
        self._whole = ""

    @property
    def text(self) -> str:
        """Text so far, without a tail that may yet become a stop string."""
        held = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._whole)), held, -1):
                if self._whole.endswith(stop[:size]):
                    held = size
                    break
        return self._whole[: len(self._whole) - held]

    def add(self, token: int) -> str | None:
        """Take one more id; return the stop string it completed, if any (the text is then cut)."""
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._read])
        now = self._decode(self._ids[self._context :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return None
        return self._take(now[len(before) :])

    def finish(self, stopped: bool) -> str:
        """Return the final text: everything, unless a stop string cut it."""
        if not stopped and self._read < len(self._ids):
            before = self._decode(self._ids[self._context : self._read])
            self._whole += self._decode(self._ids[self._context :])[len(before) :]
        return self._whole

    def _take(self, new: str) -> str | None:
        scanned = len(self._whole)
        self._whole += new
        self._context, self._read = self._read, len(self._ids)
        for stop in self._stop:
            at = self._whole.find(stop, max(0, scanned - len(stop) + 1))
            if at >= 0:
                self._whole = self._whole[: at + len(stop) if self._include else at]
                return stop
        return None

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)
