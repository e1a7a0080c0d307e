"""A model's chat template, rendered in a sandbox without transformers, which would import torch.

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


class SandboxedTemplates:
    """Stands where render_chat expects transformers' tokenizer: it renders, and no more."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._templates, self._special = templates, special_tokens

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, Any]], *, chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None, tokenize: bool, **options: Any,
    ) -> str:  # fmt: skip
        """Return a conversation as text, by the named template, the given one, or the model's for tools or without."""
        assert not tokenize
        if not (self._templates or chat_template):
            raise ValueError("this tokenizer has no chat template; pass chat_template, or a prompt instead of messages")
        name = chat_template or ("tool_use" if tools and "tool_use" in self._templates else "default")
        return render(
            self._templates.get(name, name), conversation, special_tokens=self._special, tools=tools, **options
        )


def render(
    source: str, messages: Sequence[Mapping[str, Any]], *, special_tokens: Mapping[str, str],
    add_generation_prompt: bool = True, continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None, documents: Sequence[Mapping[str, Any]] | None = None,
    **more: Any,
) -> str:  # fmt: skip
    """Return a conversation as a template's text.

    Raises ValueError for a template that is none, that refuses the messages, or does not take what they hold.
    """
    if continue_final_message and add_generation_prompt:
        raise ValueError(
            "continue_final_message goes on with the last message: set add_generation_prompt=false with it"
        )
    names = {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
    try:
        text = _compiled(source).render(messages=list(messages), **{**special_tokens, **more, **names})
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid jinja, line {error.lineno}: {error.message}") from error
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses this conversation: {error.message or error}") from error
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"the chat template does not take this conversation: {error}") from error
    return _until_final_message(text, messages) if continue_final_message else text


def _until_final_message(text: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the text up to the end of its last message's content, so that the model goes on with it."""
    final = messages[-1].get("content") if messages else None
    for content in (final, final.strip()) if isinstance(final, str) and final.strip() else ():  # templates may trim
        if (at := text.rfind(content)) >= 0:
            return text[: at + len(content)]
    raise ValueError("continue_final_message: the last message's content was not found in the rendered chat")


def check_template(source: str) -> None:
    """Raise ValueError for a text that is no valid template."""
    try:
        _compiled(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid jinja, line {error.lineno}: {error.message}") from error
