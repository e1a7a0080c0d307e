"""What the HTTP process must know of a loaded model, so that it reads no file of it: tokenizer, templates, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seamwise.runtime.text.tokenizer import Tokenizer

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def tokenizer_json(tokenizer: Tokenizer | None) -> str | None:
    """Return the tokenizers library's JSON of a tokenizer. Raises ValueError for one which that library cannot read."""
    if tokenizer is None:
        return None
    light = tokenizer._light or getattr(tokenizer.full, "backend_tokenizer", None)
    if light is None:
        raise ValueError(
            f"{tokenizer.directory}: its tokenizer has no tokenizer.json, which serving needs; convert it with"
            " transformers' convert_slow_tokenizer, or pass another directory as tokenizer"
        )
    return str(light.to_str())


def chat_templates(tokenizer: Tokenizer | None) -> dict[str, str]:
    """Return the model's chat templates by name; the one without a name is "default"."""
    if tokenizer is None:
        return {}
    directory = tokenizer.directory
    found: dict[str, str] = {}
    if not directory.is_dir() or tokenizer._light is None or not (directory / "tokenizer.json").exists():
        held = getattr(tokenizer.full, "chat_template", None)
        return dict(held) if isinstance(held, dict) else {"default": held} if held else {}
    named = _config(directory).get("chat_template")
    if isinstance(named, str):
        found["default"] = named
    elif isinstance(named, list):
        found |= {one["name"]: one["template"] for one in named}
    if (path := directory / "chat_template.jinja").exists():
        found["default"] = path.read_text()
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = path.read_text()
    return found


def special_tokens(tokenizer: Tokenizer | None) -> dict[str, str]:
    """Return the special tokens that chat templates read, by their names."""
    if tokenizer is None:
        return {}
    if tokenizer._light is None or not (tokenizer.directory / "tokenizer.json").exists():
        return {name: str(token) for name, token in tokenizer.full.special_tokens_map.items() if name in _SPECIAL}
    config = _config(tokenizer.directory)
    found = {}
    for name in _SPECIAL:
        token = config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found


def explanation(runner: Any) -> dict[str, Any]:
    """Return the compiler's report of a runner as plain data; of one that was not compiled, nothing."""
    if not hasattr(runner, "program"):
        return {}
    from seamwise.compile.explain.text import as_json

    return as_json(runner.program, runner.startup_s)


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    read: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return read
