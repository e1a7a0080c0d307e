"""A conversation as the text of one prompt: messages as clients send them, through a model's chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

FORMATS = ("auto", "string", "openai")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal", "thinking": "thinking"}


def render_chat(
    full: Any, messages: Sequence[Mapping[str, Any]], *, chat_template: str | None = None,
    chat_template_content_format: str = "auto", add_generation_prompt: bool = True,
    continue_final_message: bool = False, tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """Return the prompt that a transformers tokenizer's template makes of a conversation.

    chat_template  instead of the tokenizer's own
    chat_template_content_format  "string": a content given as parts becomes one string, its texts joined by newlines;
                   "openai": the template gets the parts; "auto": whichever the template understands
    add_generation_prompt, continue_final_message  begin an answer; leave the last message open instead
    tools          functions the model may call, as JSON schemas
    chat_template_kwargs  further variables of the template, like enable_thinking

    Raises ValueError for what is no conversation, a template that refuses it, or none to apply.
    Source: https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html#chat-template.
    """
    from jinja2 import TemplateError

    if chat_template_content_format not in FORMATS:
        wanted = ", ".join(map(repr, FORMATS))
        raise ValueError(f"chat_template_content_format={chat_template_content_format!r}: wanted one of {wanted}")
    options = _options(tools, chat_template_kwargs)
    options |= {"chat_template": chat_template, "continue_final_message": continue_final_message}
    options |= {"add_generation_prompt": add_generation_prompt, "tokenize": False}

    def render(conversation: list[dict[str, Any]]) -> str:
        return str(full.apply_chat_template(conversation, **options))

    asked = [_message(message) for message in messages]
    if (
        chat_template_content_format == "string"
        or not any(isinstance(m.get("content"), list) for m in asked)
        or (chat_template_content_format == "auto" and not _takes_parts(render, asked))
    ):
        asked = [_flat(message) for message in asked]
    asked = _with_calls(render, asked, messages)
    try:
        return render(asked)
    except (ValueError, TemplateError) as error:
        raise ValueError(f"chat: {error}") from error
    except (TypeError, AttributeError, KeyError) as error:  # what a template does with a content of another kind
        raise ValueError(f"chat: this model's template does not take these messages ({error!r})") from error


def _options(tools: Sequence[Any] | None, kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ValueError(f"chat_template_kwargs: got {kwargs!r}, wanted a dict of the template's variables")
    if tools is not None and (isinstance(tools, (str, Mapping)) or not all(isinstance(t, Mapping) for t in tools)):
        raise ValueError(f"tools: got {tools!r}, wanted a list of {{'type': 'function', 'function': {{…}}}}")
    own = {"chat_template", "continue_final_message", "add_generation_prompt", "tokenize", "conversation", "tools"}
    if taken := sorted(own & {*(kwargs or {})}):
        raise ValueError(f"chat_template_kwargs: {taken[0]!r} is an argument of its own; pass it beside the others")
    return {**(kwargs or {}), "tools": [dict(t) for t in tools] if tools else None}


def _message(message: Any) -> dict[str, Any]:
    """Return a message with its parts checked and its tool calls' arguments as objects. Raises ValueError for none."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"chat: got {message!r}, wanted messages {{'role': str, 'content': …}}")
    result, content = dict(message), message.get("content")
    if isinstance(content, (list, tuple)):
        result["content"] = [_part(part) for part in content]
    elif content is not None and not isinstance(content, str):
        raise ValueError(
            f"chat: a content is {content!r}, wanted a string or a list of {{'type': 'text', 'text': str}}"
        )
    reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    if reasoning is not None:  # templates know it by either of two names, gpt-oss's by the other
        result = {"thinking": reasoning, **result, "reasoning_content": reasoning}
    if message["role"] == "assistant" and message.get("tool_calls"):
        result["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
    return result


def _part(part: Any) -> dict[str, str]:
    """Return one part of a content as text. Raises ValueError for a picture, a sound, or what is no part."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get(_TEXTS[kind]) if kind in _TEXTS else None
    if not isinstance(text, str):
        wanted = "{'type': 'text', 'text': str}: this model is served as text"
        raise ValueError(f"chat: a part of a content is {part!r}, wanted {wanted}")
    return {"type": "text", "text": text}


def _tool_call(call: Any) -> Any:
    """Return a tool call whose arguments are an object: clients send JSON, templates read fields."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}") or {}  # null is none, too
    except ValueError as error:
        raise ValueError(f"chat: a tool call's arguments are {function['arguments']!r}, not JSON: {error}") from error
    return {**call, "function": {**function, "arguments": arguments}}


def _with_calls(render: Any, asked: list[dict[str, Any]], given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with tool calls in the first form in which a template shows every call.

    Some read arguments as an object and some as its JSON; some leave out calls beside a content that is "", and some
    print None. Where no form shows them, it is the first: an object beside "".
    """
    marked, count = [], 0
    for message in asked:
        if calls := _calls(message):
            names = [f"seamwise-call-{count + i}-" for i in range(len(calls))]
            made = [{"function": {"name": name, "arguments": {"seamwise-argument": 1}}} for name in names]
            message = {**message, "tool_calls": [{**c, **m} for c, m in zip(calls, made, strict=True)]}
            count += len(calls)
        marked.append(message)
    if not count:
        return asked
    for as_text in (False, True):
        for content in ("", None):
            try:
                shown = render(_in_form(marked, marked, content, as_text))
            except Exception:  # whatever it raises, this is not what it reads
                continue
            if all(f"seamwise-call-{i}-" in shown for i in range(count)) and "'seamwise-argument'" not in shown:
                return _in_form(asked, given, content, as_text)
    return _in_form(asked, given, "", False)


def _calls(message: Mapping[str, Any]) -> list[Any]:
    calls = list(message.get("tool_calls") or ()) if message["role"] == "assistant" else []
    return calls if all(isinstance(call, Mapping) for call in calls) else []


def _in_form(
    asked: Sequence[dict[str, Any]], given: Sequence[Mapping[str, Any]], content: str | None, as_text: bool
) -> list[dict[str, Any]]:
    """Return messages whose calls have arguments as text, as it was given, or as objects, beside a content or this."""
    made = []
    for message, original in zip(asked, given, strict=True):
        if calls := _calls(message):
            calls = [_call_as_text(call) for call in _calls(original)] if as_text else calls
            message = {**message, "content": message.get("content") or content, "tool_calls": calls}
        made.append(message)
    return made


def _call_as_text(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or isinstance(function.get("arguments"), str):
        return call
    text = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def _flat(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return message | {"content": "\n".join(part["text"] for part in content)}


def _takes_parts(render: Any, messages: list[dict[str, Any]]) -> bool:
    """Return whether a template reads parts: with marks in place of the texts, none is printed as an object."""
    marked: list[dict[str, Any]] = []
    marks: list[dict[str, str]] = []
    for message in messages:
        if isinstance(message.get("content"), list):
            parts = [
                {"type": "text", "text": f"seamwise-part-{len(marks) + i}"} for i in range(len(message["content"]))
            ]
            marks += parts
            message = message | {"content": parts}
        marked.append(message)
    try:
        shown = render(marked)
    except Exception:  # whatever it does with a list, it was not written for one
        return False
    printed = re.search(r"""['"]text['"]\s*:\s*['"]seamwise-part-""", shown)
    return printed is None and any(part["text"] in shown for part in marks)
