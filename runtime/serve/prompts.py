"""From text and conversations to token ids, in a process without the model; torch is not imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from seamwise.runtime.text.chat import render_chat

from .process.messages import Ready
from .prompt_batch import read_prompt


class Prompts:
    """The served model's tokenizer and chat templates, as its engine gave them."""

    def __init__(self, info: Ready) -> None:
        self.info = info
        self.templates = dict(info.chat_templates)
        self._tokenizer = Tokenizer.from_str(info.tokenizer) if info.tokenizer else None
        if self._tokenizer is not None:
            self._tokenizer.encode_special_tokens = info.split_special_tokens

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizers library's tokenizer. Raises ValueError for a model without one."""
        if self._tokenizer is None:
            raise ValueError(f"{self.info.model} has no tokenizer; give token ids, and detokenize=false")
        return self._tokenizer

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return a text's ids. Raises ValueError for one that is no Unicode (a lone surrogate)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text has {text[error.start]!r} at {error.start}, which is no character") from None
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ids. Raises ValueError for an id outside the vocabulary."""
        self.check(ids)
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return each id as the tokenizer spells it."""
        return [self.tokenizer.id_to_token(i) or "" for i in ids]

    def check(self, ids: Sequence[int]) -> None:
        """Raise ValueError for no ids, or one outside the vocabulary."""
        bad = [i for i in ids if not 0 <= i < self.info.vocab_size]
        if bad:
            raise ValueError(f"token id {bad[0]}: wanted 0 to {self.info.vocab_size - 1} (the vocabulary)")

    def of(self, prompt: Any) -> tuple[str | None, list[int]]:
        """Return (text, ids) of a string, {"prompt": str}, {"prompt_token_ids": [int]} or a list of ids."""
        return read_prompt(prompt, self.encode)

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Return a conversation as text, by the model's template or chat_template (a name of one, or its source).

        options  of render_chat, which says what is raised
        """
        return render_chat(self.templates, self.info.special_tokens, messages, **options)
