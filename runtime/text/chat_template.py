"""A model's chat template, rendered in a sandbox without transformers, whose import takes a second, and torch's.

The template sees what transformers gives it, by the same names: messages, tools, documents, add_generation_prompt,
special tokens, raise_exception, strftime_now, a tojson that escapes nothing, and {% generation %} blocks.
Source: https://huggingface.co/docs/transformers/chat_templating_writing
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(Extension):
    """{% generation %} … {% endgeneration %} marks what the assistant said; for a prompt it is its contents."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_contents"), [], [], body).set_lineno(line)

    def _contents(self, caller: Callable[[], str]) -> str:
        return caller()


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def render(source: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    """Return a conversation as a template's text.

    Raises ValueError for a template that is none, that refuses the messages, or does not take what they hold.
    """
    check_template(source)
    try:
        return _compiled(source).render(messages=list(messages), **variables)
    except jinja2.TemplateError as error:
        raise ValueError(f"chat: the template refuses this conversation: {error.message or error}") from error
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"chat: the template does not take this conversation: {error!r}") from error


def check_template(source: str) -> None:
    """Raise ValueError for a text that is no valid template."""
    try:
        _compiled(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"chat: the template is not valid jinja, line {error.lineno}: {error.message}") from error
