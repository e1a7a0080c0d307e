"""A model directory's tokenizer: the light one for text and ids, transformers' own for callers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from seamwise.runtime.weights.gguf.config import find_gguf
from seamwise.runtime.weights.gguf.file import read_gguf_header

from .chat import render_chat
from .prepared import Prepared, load_full, prepare, special_tokens_of, templates_of

_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "tekken.json",
)  # fmt: skip


def has_tokenizer(path: Path) -> bool:
    """Return whether a model's directory or GGUF file brings its tokenizer along."""
    return _has_files(path) or _gguf_metadata(path) is not None


def _has_files(path: Path) -> bool:
    return any((path / name).exists() for name in _FILES)


def _gguf_metadata(path: Path) -> dict[str, Any] | None:
    """Return the metadata of the GGUF file that a path stands for, where it describes a tokenizer."""
    gguf = find_gguf(path)
    metadata = None if gguf is None else read_gguf_header(gguf).metadata
    return metadata if metadata and "tokenizer.ggml.model" in metadata else None


class Tokenizer:
    """Encodes prompts and decodes outputs, to the ids and texts of transformers' tokenizer.

    Text goes through the backend of transformers' tokenizer, which after a directory's first use is read without
    transformers (0.1 s instead of 1.1); a GGUF file's is built here. transformers itself is imported for
    get_tokenizer, and where its class has ways of its own.

    eos_id  the id that ends a text by the tokenizer, where it names one
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._full: Any = None
        self._gguf: dict[str, Any] | None = None
        self._made: Prepared | None = None
        if not _has_files(directory) and (metadata := _gguf_metadata(directory)):
            self._gguf = metadata
            self._light, self.eos_id = _of_gguf(metadata, str(directory))
        else:
            self._made = made = prepare(directory)
            self._light, self.eos_id, self._full = made.light, made.eos_id, made.full

    @property
    def full(self) -> Any:
        """The transformers tokenizer."""
        if self._full is None and self._gguf is not None:
            from transformers import PreTrainedTokenizerFast

            from seamwise.runtime.weights.gguf.tokenizer import special_tokens

            named = special_tokens(self._gguf, str(self.directory))
            self._full = PreTrainedTokenizerFast(tokenizer_object=self._light, **named)
        if self._full is None:
            self._full = load_full(self.directory)
        return self._full

    @cached_property
    def chat_templates(self) -> dict[str, str]:
        """Chat templates by name; the one without a name is "default"."""
        return templates_of(self.full) if self._made is None else self._made.chat_templates

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """Special tokens by the names that chat templates read them by, like bos_token."""
        return special_tokens_of(self.full) if self._made is None else self._made.special_tokens

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that decode to nothing when special tokens are skipped."""
        if self._light is None:
            return frozenset(self.full.all_special_ids)
        return frozenset(i for i, token in self._light.get_added_tokens_decoder().items() if token.special)

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of each token, added ones too."""
        return dict(self._light.get_vocab(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return ids, with the special tokens the tokenizer adds by itself where they are wanted."""
        if self._light is None:
            return list(self.full.encode(text, add_special_tokens=add_special_tokens))
        return list(self._light.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        if self._light is None:
            return str(self.full.decode(list(ids), skip_special_tokens=skip_special_tokens))
        return str(self._light.decode(list(ids), skip_special_tokens=skip_special_tokens))

    @property
    def split_special_tokens(self) -> bool:
        """Whether special tokens that stand in a text are encoded as any other text (transformers' option)."""
        return bool(getattr(self._light, "encode_special_tokens", False))

    def as_json(self) -> str:
        """Return the backend's tokenizer.json, without padding and truncation, for libraries that read one.

        Raises ValueError for a tokenizer that only transformers' Python code knows.
        """
        from tokenizers import Tokenizer as Backend

        light = self._light if self._light is not None else getattr(self.full, "backend_tokenizer", None)
        if light is None:
            raise ValueError(
                f"{self.directory}: its tokenizer has no tokenizer.json, which servers and grammars need; convert it"
                " with transformers' convert_slow_tokenizer, or pass another directory as tokenizer"
            )
        copy = Backend.from_str(light.to_str())
        copy.no_padding()
        copy.no_truncation()
        return str(copy.to_str())

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Return the ids of a conversation; options are render_chat's.

        Raises ValueError for what is no conversation, a template that refuses it, or none to apply.
        """
        text = render_chat(self.chat_templates, self.special_tokens, messages, **options)
        return self.encode(text, add_special_tokens=False)


def _of_gguf(metadata: dict[str, Any], where: str) -> tuple[Any, int | None]:
    """Return the tokenizer a GGUF file describes, and its end-of-sequence id."""
    from tokenizers import AddedToken

    from seamwise.runtime.weights.gguf.tokenizer import build_tokenizer, special_tokens

    light = build_tokenizer(metadata, where)
    named = special_tokens(metadata, where)
    held = {token.content for token in light.get_added_tokens_decoder().values()}
    for role, token in named.items():  # as transformers adds them, whatever kind of token the file calls them
        if role != "chat_template" and token not in held:
            light.add_tokens([AddedToken(token, special=True, normalized=False)])
    eos = named.get("eos_token")
    return light, None if eos is None else light.token_to_id(eos)
