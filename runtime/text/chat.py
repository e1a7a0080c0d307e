"""A conversation as the text of one prompt: messages as clients send them, through a model's chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

Render = Callable[[list[dict[str, Any]]], str]
FORMATS = ("auto", "string", "openai")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_HERE = "seamwise-goes-on-here "  # stands where a last message is to be continued
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal", "thinking": "thinking"}


def render_chat(
    templates: Mapping[str, str], special_tokens: Mapping[str, str], messages: Sequence[Mapping[str, Any]], *,
    chat_template: str | None = None, chat_template_content_format: str = "auto", add_generation_prompt: bool = True,
    continue_final_message: bool = False, tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """Return the prompt that a model's template makes of a conversation, as transformers does.

    templates, special_tokens  of the model's tokenizer, by name; "tool_use" is used where there are tools
    chat_template  the name of one of them, or another's source
    chat_template_content_format  "string": a content given as parts becomes one string, its texts joined by newlines;
                   "openai": the template gets the parts; "auto": whichever the template understands
    add_generation_prompt, continue_final_message  begin an answer; leave the last message open instead
    tools          functions the model may call, as JSON schemas
    chat_template_kwargs  further variables of the template, like enable_thinking

    Raises ValueError for what is no conversation, a template that refuses it, or none to apply.
    Source: https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html#chat-template.
    """
    from .chat_template import render as render_template

    if chat_template_content_format not in FORMATS:
        wanted = ", ".join(map(repr, FORMATS))
        raise ValueError(f"chat_template_content_format={chat_template_content_format!r}: wanted one of {wanted}")
    if continue_final_message and add_generation_prompt:
        raise ValueError(
            "chat: continue_final_message goes on with the last message: set add_generation_prompt=false with it"
        )
    variables = {"documents": None, **special_tokens, **_options(tools, chat_template_kwargs)}
    variables["add_generation_prompt"] = add_generation_prompt
    name = chat_template or ("tool_use" if tools and "tool_use" in templates else "default")
    if chat_template is None and name not in templates:
        there = f"; there are {', '.join(templates)}" if templates else ""
        raise ValueError(f"chat: this model has no chat template; give chat_template, or text{there}")
    source = templates.get(name, name)

    def render(conversation: list[dict[str, Any]]) -> str:
        return render_template(source, conversation, variables)

    asked = [_message(message) for message in messages]
    if (
        chat_template_content_format == "string"
        or not any(isinstance(m.get("content"), list) for m in asked)
        or (chat_template_content_format == "auto" and not _takes_parts(render, _in_form(asked)))
    ):
        asked = [_flat(message) for message in asked]
    asked = _with_calls(render, _with_developers(render, asked))
    return _continued(render, asked) if continue_final_message else render(asked)


def _continued(render: Render, messages: list[dict[str, Any]]) -> str:
    """Return the text up to the end of its last message's content, so that the model goes on with it."""
    content = messages[-1].get("content") if messages else None
    parts = content if isinstance(content, list) else []
    said = parts[-1]["text"] if parts else content
    if isinstance(said, str):
        marked = said + _HERE
        last = messages[-1] | {"content": [*parts[:-1], {"type": "text", "text": marked}] if parts else marked}
        text = render([*messages[:-1], last])
        at = text.rfind(_HERE.strip())
        if at >= 0 and said.strip() in text:
            return text[:at] if text[at:].startswith(_HERE) else text[:at].rstrip()  # templates may trim
    raise ValueError("continue_final_message: the last message's content was not found in the rendered chat")


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
    result = {name: value for name, value in message.items() if value is not None}
    content = result.get("content")
    if isinstance(content, (list, tuple)):
        result["content"] = [_part(part) for part in content]
    elif content is not None and not isinstance(content, str):
        raise ValueError(
            f"chat: a content is {content!r}, wanted a string or a list of {{'type': 'text', 'text': str}}"
        )
    reasoning = next((result[key] for key in _REASONING if key in result), None)
    if reasoning is not None:  # templates know it by either of two names, gpt-oss's by the other
        result = {"thinking": reasoning, **result, "reasoning_content": reasoning}
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


def _with_developers(render: Render, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages in the first form in which a template shows those of role "developer".

    Templates that do not know it leave them out, and some take one system message only, the first.
    """
    if all(message["role"] != "developer" for message in asked):
        return asked
    mark = "seamwise-developer"
    marked = [{**m, "content": mark} if m["role"] == "developer" else m for m in asked]
    for form, shown in zip(_forms_of_developers(asked), _forms_of_developers(marked), strict=True):
        with suppress(Exception):  # whatever it raises, this is not what it reads
            if render(_in_form(shown)).count(mark) >= sum(m["role"] == "developer" for m in asked):
                return form
    render(_in_form(marked))  # raises what a template says that takes neither
    raise ValueError("chat: this model's template shows neither a developer's nor a system's message; leave it out")


def _forms_of_developers(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield messages as they are, with role "system", and with all of these in one at the beginning."""
    yield messages
    systems = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
    yield systems
    first = "\n\n".join(_flat(m).get("content") or "" for m in systems if m["role"] == "system")
    yield [{"role": "system", "content": first}, *(m for m in systems if m["role"] != "system")]


def _with_calls(render: Render, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with tool calls in the first form in which a template shows every call.

    Some read arguments as an object and some as its JSON; some leave out calls beside a content that is "", and some
    print None. Where no form shows them, it is the first: an object beside "".
    """
    names = [f"seamwise-call-{i}-" for i in range(sum(len(_calls(m)) for m in asked))]
    functions = [{"name": name, "arguments": {"seamwise-argument": 1}} for name in names]
    left, plain = iter(functions), _in_form(asked)
    marked = [
        {**m, "tool_calls": [{**call, "function": next(left)} for call in _calls(m)]} if _calls(m) else m for m in asked
    ]
    for as_text, content in [(as_text, content) for as_text in (False, True) for content in ("", None) if names]:
        try:
            shown = render(_in_form(marked, as_text, content))
        except Exception:  # whatever it raises, this is not what it reads
            continue
        if all(name in shown for name in names) and "'seamwise-argument'" not in shown:
            return _in_form(asked, as_text, content)
    return plain


def _calls(message: Mapping[str, Any]) -> list[Any]:
    calls = list(message.get("tool_calls") or ()) if message["role"] == "assistant" else []
    return calls if all(isinstance(call, Mapping) for call in calls) else []


def _in_form(asked: list[dict[str, Any]], as_text: bool = False, content: str | None = "") -> list[dict[str, Any]]:
    """Return messages whose calls have arguments as text or as objects, and stand beside a content, or this one."""
    return [
        {**m, "content": m.get("content") or content, "tool_calls": [_call(c, as_text) for c in _calls(m)]}
        if _calls(m)
        else m
        for m in asked
    ]


def _call(call: Mapping[str, Any], as_text: bool) -> Mapping[str, Any]:
    """Return a tool call with its arguments as text, as it was given if it was, or as an object."""
    function = call.get("function")
    if not isinstance(function, Mapping):
        return call
    given = function.get("arguments") or "{}"
    if isinstance(given, str) == as_text:
        return call
    try:
        made = json.dumps(given, ensure_ascii=False) if as_text else json.loads(given) or {}
    except ValueError as error:
        raise ValueError(f"chat: a tool call's arguments are {given!r}, not JSON: {error}") from error
    return {**call, "function": {**function, "arguments": made}}


def _flat(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return message | {"content": "\n".join(part["text"] for part in content)}


def _takes_parts(render: Render, messages: list[dict[str, Any]]) -> bool:
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
