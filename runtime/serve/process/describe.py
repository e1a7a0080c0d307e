"""What the HTTP process must know of a loaded model, so that it reads no file of it: tokenizer, templates, report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seamwise.runtime.text.tokenizer import Tokenizer


def tokenizer_json(tokenizer: Tokenizer | None) -> str | None:
    """Return the tokenizers library's JSON of a tokenizer. Raises ValueError for one which that library cannot read."""
    return None if tokenizer is None else tokenizer.as_json()


def chat_templates(tokenizer: Tokenizer | None) -> dict[str, str]:
    """Return the model's chat templates by name; the one without a name is "default"."""
    return {} if tokenizer is None else dict(tokenizer.chat_templates)


def special_tokens(tokenizer: Tokenizer | None) -> dict[str, str]:
    """Return the special tokens that chat templates read, by their names."""
    return {} if tokenizer is None else dict(tokenizer.special_tokens)


def explanation(runner: Any) -> dict[str, Any]:
    """Return the compiler's report of a runner as plain data; of one that was not compiled, nothing."""
    if not hasattr(runner, "program"):
        return {}
    from seamwise.compile.explain.text import as_json

    return as_json(runner.program, runner.startup_s)
