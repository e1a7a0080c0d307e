"""A directory's tokenizer as transformers makes it of all its files, kept so that transformers is imported only once.

What a tokenizer does is spread over tokenizer.json, tokenizer_config.json, added_tokens.json, special_tokens_map.json
and rules of transformers' classes. None of it is read here: transformers builds the tokenizer, and the state of its
backend (a tokenizer of the tokenizers library) is kept under a digest of those files. Later starts read that alone, in
a tenth of the time.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from seamwise import caches

from .json_file import read_json

_FORMAT = 2
_CODE = "trust_remote_code"  # what transformers' refusal to run a directory's code speaks of
_SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".jinja")  # of files that a tokenizer may be read from
_LARGEST_BYTES = 64 << 20  # of such a file; the largest published, Gemma's tokenizer.json, has 33 MB
_MOST_KEPT = 64
_OWN_WAYS = ("__call__", "encode", "decode", "_encode_plus", "_decode")  # methods that classes may replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What is kept of a tokenizer.

    light    transformers' backend, None where its class computes otherwise
    eos_id   the id that ends a text, where it names one
    chat_templates, special_tokens  by name; the template without one is "default"
    full     transformers' own, once imported
    """

    light: Any
    eos_id: int | None
    chat_templates: dict[str, str]
    special_tokens: dict[str, str]
    full: Any = None


def templates_of(full: Any) -> dict[str, str]:
    """Return the chat templates of transformers' tokenizer, by name."""
    held = full.chat_template
    return dict(held) if isinstance(held, dict) else {"default": held} if held else {}


def special_tokens_of(full: Any) -> dict[str, str]:
    """Return the special tokens of transformers' tokenizer, by the names that templates read them by."""
    return {name: str(token) for name, token in full.special_tokens_map.items() if isinstance(token, str)}


def prepare(directory: Path) -> Prepared:
    """Return a directory's tokenizer. Raises ValueError when transformers cannot load it."""
    kept = caches.folder("tokenizers") / f"{_key(directory)}.json"
    try:
        if kept.exists():
            caches.check_private(kept.parent)
            return _read(kept, directory)
    except (ValueError, TypeError, KeyError, OSError) as error:
        warnings.warn(f"{kept}: cannot be used ({error}); it is made again", stacklevel=2)
    full = load_full(directory)
    made = _describe(full, directory)
    try:
        _write(kept, made)
    except OSError as error:
        warnings.warn(f"{kept.parent}: the tokenizer cannot be kept there: {error}", stacklevel=2)
    return _prepared(made, directory, full)


def load_full(directory: Path) -> Any:
    """Return transformers' tokenizer; no code of the directory is run. Raises ValueError when it cannot be loaded."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        try:
            return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        except (OSError, ValueError) as error:  # a class that is code of the directory, or no config.json to name one
            nameless = _CODE in str(error) or not (directory / "config.json").exists()
            if not (nameless and (directory / "tokenizer.json").exists()):
                raise
            return PreTrainedTokenizerFast.from_pretrained(directory)
    except Exception as error:  # classes raise what they like for a file they cannot parse, bare Exception too
        code = _CODE in str(error)
        reason = "it is code of the directory, which is never run" if code else _damaged(directory) or error
        raise ValueError(
            f"{directory}: has no tokenizer that transformers can load ({reason}); pass tokenizer=, or"
            ' skip_tokenizer_init=True and prompts as {"prompt_token_ids": […]} with detokenize=False'
        ) from error


def _damaged(directory: Path) -> str | None:
    """Return which of a directory's JSON files cannot be read, and why."""
    for path in sorted(directory.glob("*.json")):
        try:
            read_json(path, dict)
        except ValueError as error:
            return str(error)
    return None


def _key(directory: Path) -> str:
    digest = hashlib.sha256()
    # Some classes go by the path, which holds the hub's name.
    for part in (_FORMAT, version("transformers"), version("tokenizers"), directory.absolute()):
        digest.update(f"{part}\0".encode())
    for path in sorted([*directory.iterdir(), *directory.glob("additional_chat_templates/*")]):
        if path.suffix in _SUFFIXES and path.is_file() and path.stat().st_size < _LARGEST_BYTES:
            content = path.read_bytes()
            digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:32]


def _describe(full: Any, directory: Path) -> dict[str, Any]:
    """Return what of transformers' tokenizer is kept; its state only where it differs from tokenizer.json as read."""
    from transformers import PreTrainedTokenizerFast

    made = {"format": _FORMAT, "eos_id": full.eos_token_id, "light": False, "state": None, "split": False}
    made |= {"chat_templates": templates_of(full), "special_tokens": special_tokens_of(full)}
    plain = isinstance(full, PreTrainedTokenizerFast) and all(
        getattr(type(full), name) is getattr(PreTrainedTokenizerFast, name) for name in _OWN_WAYS
    )
    if not plain:
        return made
    made |= {"light": True, "split": bool(full.split_special_tokens), "state": full.backend_tokenizer.to_str()}
    if (directory / "tokenizer.json").exists():
        unchanged = _light(made | {"state": None}, directory).to_str()
        if unchanged == _light(made, directory).to_str():
            made["state"] = None
    return made


def _light(made: dict[str, Any], directory: Path) -> Any:
    """Return the backend that was described, None when there is none. Raises ValueError when it cannot be read."""
    from tokenizers import Tokenizer

    if not made["light"]:
        return None
    state = made["state"]
    try:
        light = Tokenizer.from_file(str(directory / "tokenizer.json")) if state is None else Tokenizer.from_str(state)
    except Exception as error:  # the library raises bare Exception for a file it cannot parse
        raise ValueError(f"{directory}: not a tokenizer: {error}") from error
    light.no_truncation()  # the file may keep what it was last called with; transformers resets both
    light.no_padding()
    light.encode_special_tokens = made["split"]
    return light


def _read(kept: Path, directory: Path) -> Prepared:
    made = json.loads(kept.read_text(encoding="utf-8"))
    if made["format"] != _FORMAT:
        raise ValueError(f"format {made['format']}, wanted {_FORMAT}")
    os.utime(kept)  # the least recently used go first
    return _prepared(made, directory)


def _prepared(made: dict[str, Any], directory: Path, full: Any = None) -> Prepared:
    return Prepared(
        light=_light(made, directory), eos_id=made["eos_id"], chat_templates=made["chat_templates"],
        special_tokens=made["special_tokens"], full=full,
    )  # fmt: skip


def _write(kept: Path, made: dict[str, Any]) -> None:
    caches.make_private(kept.parent)
    caches.remove_left_overs(kept.parent, ".writing-")
    caches.keep_newest(kept.parent, _MOST_KEPT)
    descriptor, temporary = tempfile.mkstemp(dir=kept.parent, prefix=".writing-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(made, file)
        os.replace(temporary, kept)
    finally:
        Path(temporary).unlink(missing_ok=True)
