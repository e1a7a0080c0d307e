"""Conversations as clients send them, through templates of every kind: parts, tool calls, options, and mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from older_transformers import compared_with_5_23
from tiny_tokenizers import bpe, write

from seamwise.runtime.text.chat import render_chat
from seamwise.runtime.text.tokenizer import Tokenizer

PRINTS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
JOINS = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
AS_JSON = "{% for m in messages %}{{ m['content'] | tojson }}{% endfor %}"
TAKES_PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endif %}{% endfor %}"
)
TOOLS = "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}{% for m in messages %}{{ m.content }}" + (
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}{% endfor %}{% endfor %}"
)
GIVEN = ('{"x":"ä"}', "null")  # arguments of calls, as clients send them back
PARTS = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the templates and special tokens of a tokenizer that has no template."""
    tokenizer = Tokenizer(write(tmp_path_factory.mktemp("chat"), bpe(), {"tokenizer_config.json": {}}))
    return tokenizer.chat_templates, tokenizer.special_tokens


def render(full: Any, content: Any, template: str, **options: Any) -> str:
    options = {"add_generation_prompt": False} | options
    return render_chat(*full, [{"role": "user", "content": content}], chat_template=template, **options)


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (PRINTS, "<user>Hi\nthere"),
        (JOINS, "<user>Hi\nthere"),
        (AS_JSON, '"Hi\\nthere"'),
        ("{{ messages[0].content | trim | upper }}", "HI\nTHERE"),
        (TAKES_PARTS, "<user>[Hi][there]"),
    ],
)
def test_parts_become_what_the_template_reads(full: Any, template: str, wanted: str) -> None:
    assert render(full, PARTS, template) == wanted
    assert render(full, ["Hi", "there"], template) == wanted
    assert render(full, tuple(PARTS), template) == wanted


def test_the_format_can_be_said(full: Any) -> None:
    assert render(full, PARTS, TAKES_PARTS, chat_template_content_format="string") == "<user>Hi\nthere"
    assert "'text': 'Hi'" in render(full, PARTS, PRINTS, chat_template_content_format="openai")
    with pytest.raises(ValueError, match=r"chat_template_content_format='list': wanted one of 'auto', 'string'"):
        render(full, PARTS, PRINTS, chat_template_content_format="list")


def test_the_callers_messages_are_left_alone(full: Any) -> None:
    messages = [{"role": "user", "content": [dict(PARTS[0])]}]
    render_chat(*full, messages, chat_template=JOINS, add_generation_prompt=False)
    assert messages == [{"role": "user", "content": [PARTS[0]]}]


@pytest.mark.parametrize("kind", ["input_text", "output_text", "refusal", "thinking"])
def test_every_kind_of_text_is_a_text(full: Any, kind: str) -> None:
    name = kind if kind in ("refusal", "thinking") else "text"
    assert render(full, [{"type": kind, name: "Hi"}], JOINS) == "<user>Hi"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], r"part of a content is \{'type': 'image_url'.*as text"),
        ([{"type": "text"}], "part of a content is"),
        ([{"text": "Hi"}], "part of a content is"),
        ([None], "part of a content is None"),
        (3, "a content is 3, wanted a string or a list"),
        ({"type": "text", "text": "Hi"}, "a content is .*wanted a string or a list"),
    ],
)
def test_what_is_no_text_is_refused(full: Any, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(full, content, TAKES_PARTS)


def test_tools_and_their_calls(full: Any) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    options: dict[str, Any] = {"chat_template": TOOLS, "add_generation_prompt": False}
    assert render_chat(*full, messages, tools=[tool], **options) == "weather;?Bern"
    assert render_chat(*full, messages[:1], **options) == "?"
    call["function"]["arguments"] = "{"  # type: ignore[index]
    with pytest.raises(ValueError, match=r"a tool call's arguments are '{', not JSON"):
        render_chat(*full, messages, **options)
    for wrong in ("weather", tool, ["weather"]):
        with pytest.raises(ValueError, match=r"tools: got .*, wanted a list of"):
            render_chat(*full, messages[:1], tools=wrong, **options)  # type: ignore[arg-type]


CALLS = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}[{{ c.function.name }}ARGUMENTS]{% endfor %}{% endfor %}"
)
SILENT = "{% for m in messages %}{{ m.content or '' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (CALLS.replace("ARGUMENTS", "{{ c.function.arguments | tojson }}"), '[f{"x": "ä"}][g{}]'),
        (CALLS.replace("ARGUMENTS", "{% for k, v in c.function.arguments.items() %} {{ k }}{% endfor %}"), "[f x][g]"),
        (CALLS.replace("ARGUMENTS", "{{ ' ' + c.function.arguments }}"), '[f {"x":"ä"}][g null]'),  # DeepSeek's
        (CALLS.replace("ARGUMENTS", "{{ c.function.arguments }}"), '[f{"x":"ä"}][gnull]'),  # would be Python's spelling
        (CALLS.replace("m.tool_calls", "(m.tool_calls if m.content is none else [])"), "[fARGUMENTS][gARGUMENTS]"),
        (CALLS.replace("{% for c", "{{ m.content + '' }}{% for c"), "?[fARGUMENTS][gARGUMENTS]sun"),
        (SILENT, "?sun"),
    ],
)
@pytest.mark.parametrize("beside", [{"content": None}, {"content": ""}, {}])
def test_calls_stand_in_the_form_that_the_template_shows(template: str, wanted: str, beside: dict[str, Any]) -> None:
    calls = [
        {"id": n, "type": "function", "function": {"name": n, "arguments": a}} for n, a in zip("fg", GIVEN, strict=True)
    ]
    said = {"role": "assistant", "tool_calls": calls, **beside}
    messages = [{"role": "user", "content": "?"}, said, {"role": "tool", "content": "sun", "tool_call_id": "f"}]
    got = render_chat({}, {}, messages, chat_template=template, add_generation_prompt=False)
    assert got == wanted
    assert (
        said == {"role": "assistant", "tool_calls": calls, **beside} and calls[0]["function"]["arguments"] == GIVEN[0]
    )  # type: ignore[index]


EACH = "{% for m in messages %}{% if m.role in [ROLES] %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
ONE_FIRST = "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('only first') }}"
ONE_FIRST += "{% elif m.role == 'developer' %}{{ raise_exception('what role') }}{% endif %}"
ONE_FIRST += "<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (EACH.replace("ROLES", "'system', 'developer', 'user'"), "<system>Be.<developer>Brief.<user>Hi"),
        (EACH.replace("ROLES", "'system', 'user'"), "<system>Be.<system>Brief.<user>Hi"),
        (ONE_FIRST, "<system>Be.\n\nBrief.<user>Hi"),
    ],
)
def test_a_developers_message_is_never_left_out(template: str, wanted: str) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be."}, {"role": "developer", "content": [{"type": "text", "text": "Brief."}]},
        {"role": "user", "content": "Hi"},
    ]  # fmt: skip
    assert render_chat({}, {}, messages, chat_template=template) == wanted
    with pytest.raises(ValueError, match="template shows neither a developer's nor a system's message"):
        render_chat({}, {}, messages, chat_template=EACH.replace("ROLES", "'user'"))
    with pytest.raises(ValueError, match="no system here"):
        render_chat({}, {}, messages, chat_template="{{ raise_exception('no system here') }}")


@compared_with_5_23("leaves names as they are")
@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_has_the_names_that_transformers_gives_it(name: str, demo_model: Path) -> None:
    template = "{{ messages[0].thinking }}|{{ messages[0].reasoning_content }}|{{ messages[0].content }}"
    messages = [{"role": "assistant", "content": "4", name: "2 + 2"}]
    got = render_chat({}, {}, messages, chat_template=template)
    full = Tokenizer(demo_model).full
    assert got == full.apply_chat_template(messages, chat_template=template, tokenize=False) == "2 + 2|2 + 2|4"


def test_a_last_message_is_continued(full: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [{"type": "text", "text": "So "}]}]
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    got = render_chat(*full, messages, chat_template=template, add_generation_prompt=False, continue_final_message=True)
    assert got == "<user>Hi</><assistant>So "
    with pytest.raises(ValueError, match="set add_generation_prompt=false"):
        render_chat(*full, messages, chat_template=template, continue_final_message=True)


def test_variables_of_a_template(full: Any) -> None:
    template = "{{ 'think' if enable_thinking else 'answer' }}"
    assert render(full, "Hi", template, chat_template_kwargs={"enable_thinking": True}) == "think"
    assert render(full, "Hi", template) == "answer"
    with pytest.raises(ValueError, match="chat_template_kwargs: 'tools' is an argument of its own"):
        render(full, "Hi", template, chat_template_kwargs={"tools": []})
    with pytest.raises(ValueError, match=r"chat_template_kwargs: got \[\], wanted a dict"):
        render(full, "Hi", template, chat_template_kwargs=[])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system') }}", "chat: the template refuses this conversation: no system"),
        ("{{ messages[0].content + 1 }}", "does not take this conversation"),
        ("{% for", "chat: the template is not valid jinja, line 1"),
        (None, "chat: this model has no chat template; give chat_template"),
    ],
)
def test_a_template_that_refuses_is_quoted(full: Any, template: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(full, "Hi", template)  # type: ignore[arg-type]


@pytest.mark.parametrize("message", ["Hi", {"content": "Hi"}, {"role": 3, "content": "Hi"}, None])
def test_what_is_no_message_is_refused(full: Any, message: Any) -> None:
    with pytest.raises(ValueError, match=r"chat: got .*, wanted messages \{'role': str"):
        render_chat(*full, [message], chat_template=PRINTS)


def test_a_template_is_found_by_name_or_by_what_is_asked() -> None:
    templates = {"tool_use": "tools", "rag": "rag"}
    messages = [{"role": "user", "content": "Hi"}]
    assert render_chat(templates, {}, messages, chat_template="rag") == "rag"
    assert render_chat(templates, {}, messages, tools=[{"type": "function"}]) == "tools"
    with pytest.raises(ValueError, match="has no chat template; give chat_template, or text; there are tool_use, rag"):
        render_chat(templates, {}, messages)


def test_the_demo_models_template_takes_parts(demo_model: Path) -> None:
    tokenizer = Tokenizer(demo_model)
    got = [tokenizer.apply_chat_template([{"role": "user", "content": c}]) for c in (PARTS, "Hi\nthere")]
    assert got[0] == got[1] and len(got[0]) > 10
