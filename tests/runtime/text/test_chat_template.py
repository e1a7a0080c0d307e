"""Chat templates render as transformers renders them, in a sandbox."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from seamwise.runtime.text.chat import render_chat
from seamwise.runtime.text.chat_template import render

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2 <in> ä?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"ä": {}}}}}]
SOURCES = {
    "loops": "{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}{{ m.role }}:"
    " {{ m['content'] | trim }}\n"
    "{%- endfor %}\n  {% if add_generation_prompt %}\n  <go>\n  {% endif %}",
    "tools": "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{{ bos_token }}{{ messages[0] | tojson }}",
    "namespaces": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ extra }}",
}


@pytest.mark.parametrize("source", [*SOURCES, "the model's own"])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [True, False])
def test_it_is_transformers_text(source: str, tools: Any, prompt: bool, demo_model: Path) -> None:
    from seamwise.runtime.text.tokenizer import Tokenizer

    full = Tokenizer(demo_model).full
    text = SOURCES.get(source) or (demo_model / "chat_template.jinja").read_text()
    options: dict[str, Any] = {"tools": tools, "add_generation_prompt": prompt}
    want = full.apply_chat_template(MESSAGES, chat_template=text, tokenize=False, extra="!", **options)
    special = dict(full.special_tokens_map)
    assert render_chat({"default": text}, special, MESSAGES, chat_template_kwargs={"extra": "!"}, **options) == want


THOUGHTS: list[dict[str, Any]] = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": None, "reasoning": "I add.", "tool_calls": None},
    {"role": "assistant", "content": " Four is ", "thinking": "Two and two."},
]
READS = "{% for m in messages %}<{{ m.role }}>{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.content }}</>{% endfor %}"


@pytest.mark.parametrize("source", [READS, READS.replace("m.content", "(m.content or '') | trim")])
@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("content", [" Four is ", "", [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}]])
def test_nothing_thoughts_and_a_last_message_are_as_transformers_has_them(
    source: str, goes_on: bool, content: Any, demo_model: Path
) -> None:
    from seamwise.runtime.text.tokenizer import Tokenizer

    full = Tokenizer(demo_model).full
    messages = [*THOUGHTS[:-1], THOUGHTS[-1] | {"content": content}]
    flat = [m | {"content": "a\nb "} if isinstance(m["content"], list) else m for m in messages]
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": goes_on}
    want = full.apply_chat_template(flat, chat_template=source, tokenize=False, **options)
    assert render_chat({"default": source}, {}, messages, **options) == want


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for", "not valid jinja, line 1"),
        ("{{ messages.append(1) }}", "refuses this conversation"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses this conversation"),
        ("{{ messages[0].content + 1 }}", "does not take this conversation"),
        ("{{ messages[9].content.x }}", "refuses this conversation"),
        ("{{ cycler.__init__.__globals__ }}", "refuses this conversation"),
        ("{{ range(10000000) | list | length }}", "does not take this conversation"),
    ],
)
def test_what_a_template_may_not_do(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(source, MESSAGES, {})
