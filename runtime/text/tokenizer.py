"""A model directory's tokenizer: the light one for text and ids, transformers' own for chat templates and callers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from seamwise.runtime.weights.gguf.config import find_gguf
from seamwise.runtime.weights.gguf.file import read_gguf_header


def has_tokenizer(path: Path) -> bool:
    """Return whether a model's directory or GGUF file brings its tokenizer along."""
    return _has_files(path) or _gguf_metadata(path) is not None


def _has_files(path: Path) -> bool:
    return any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


def _gguf_metadata(path: Path) -> dict[str, Any] | None:
    """Return the metadata of the GGUF file that a path stands for, where it describes a tokenizer."""
    gguf = find_gguf(path)
    metadata = None if gguf is None else read_gguf_header(gguf).metadata
    return metadata if metadata and "tokenizer.ggml.model" in metadata else None


class Tokenizer:
    """Encodes prompts and decodes outputs.

    tokenizer.json is read by the tokenizers library alone (0.1 s), and a GGUF file's tokenizer is built with it;
    transformers (1 s more) is imported only for a chat template, for get_tokenizer, or when a directory has neither.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._full: Any = None
        self._light: Any = None
        self._gguf: dict[str, Any] | None = None
        if (directory / "tokenizer.json").exists():
            from tokenizers import Tokenizer as Light

            try:
                self._light = Light.from_file(str(directory / "tokenizer.json"))
                self._light.no_truncation()  # the file may keep what it was last called with; transformers resets both
                self._light.no_padding()
            except Exception as error:  # the library raises bare Exception for a file it cannot parse
                raise ValueError(f"{directory}/tokenizer.json: not a tokenizer: {error}") from error
        elif not _has_files(directory) and (metadata := _gguf_metadata(directory)):
            from seamwise.runtime.weights.gguf.tokenizer import build_tokenizer

            self._gguf, self._light = metadata, build_tokenizer(metadata, str(directory))

    @property
    def full(self) -> Any:
        """The transformers tokenizer. Raises ValueError when the directory holds none."""
        if self._full is None and self._gguf is not None:
            from transformers import PreTrainedTokenizerFast

            from seamwise.runtime.weights.gguf.tokenizer import special_tokens

            named = special_tokens(self._gguf, str(self.directory))
            self._full = PreTrainedTokenizerFast(tokenizer_object=self._light, **named)
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

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that decode to nothing when special tokens are skipped."""
        if self._light is None:
            return frozenset(self.full.all_special_ids)
        return frozenset(i for i, token in self._light.get_added_tokens_decoder().items() if token.special)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return ids, with the special tokens the tokenizer adds by itself unless they are unwanted."""
        if self._light is None:
            return list(self.full.encode(text, add_special_tokens=add_special_tokens))
        return list(self._light.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        if self._light is None:
            return str(self.full.decode(list(ids), skip_special_tokens=skip_special_tokens))
        return str(self._light.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, chat_template: str | None, add_generation_prompt: bool
    ) -> list[int]:
        """Return the ids of a conversation.

        Raises ValueError for what is no conversation, a template that refuses it, or none to apply.
        """
        from jinja2 import TemplateError

        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ValueError(f"chat: got {message!r}, wanted messages {{'role': str, 'content': …}}")
        try:
            text = self.full.apply_chat_template(
                list(messages), chat_template=chat_template, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except (ValueError, TemplateError) as error:
            raise ValueError(f"chat: {error}") from error
        except TypeError as error:  # a template that joins strings meets another content
            raise ValueError(f"chat: this model's template does not take such a content ({error}); use str") from error
        if self._light is None:
            return list(self.full.encode(text, add_special_tokens=False))
        return list(self._light.encode(text, add_special_tokens=False).ids)
