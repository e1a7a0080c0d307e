"""tool_choice: the form says what may be called, and what has the form is read as calls; with the real client too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import llguidance
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from servers import run_command
from test_chat_parts import read

from seamwise.runtime.sampling.structured import StructuredOutputsParams
from seamwise.runtime.serve.chat_parts import ChatParts
from seamwise.runtime.serve.tool_choice import Choice, tool_form

ADD = {
    "name": "add", "strict": True,
    "parameters": {"properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False},
}  # fmt: skip
NOW = {"name": "wie spät?"}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "wie spät?", "arguments": {}}\n</tool_call>'
OBJECT = '{"name": "add", "parameters": {"a": 1}}'
ONE = {"type": "function", "function": {"name": "add"}}


def holds(form: StructuredOutputsParams, text: str) -> bool:
    """Whether a text has the form, whole."""
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), form.as_grammar())
    data = list(text.encode())
    return bool(matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting())


@pytest.mark.parametrize(
    ("choice", "written", "parallel", "good", "bad"),
    [
        ("required", "hermes", True, [CALL, TIME, f"{CALL}\n{TIME}"], ["Well.", "", CALL.replace("1", '"1"')]),
        ("required", "hermes", False, [CALL], [CALL + CALL, CALL.replace("add", "sub")]),
        (ONE, "hermes", True, [CALL], [TIME, CALL + CALL]),
        ("required", "llama3_json", True, [OBJECT], [OBJECT + OBJECT, CALL, OBJECT.replace('"a"', '"b"')]),
        ("auto", "hermes", True, ["Well.", CALL, f"Well. {TIME}"], [CALL.replace("1", "true"), "<tool_call>oh"]),
    ],
)
def test_what_may_be_said(choice: Choice, written: str, parallel: bool, good: list[str], bad: list[str]) -> None:
    form = tool_form([ADD, NOW], choice, written, parallel=parallel)
    assert form is not None
    form.check()
    assert [holds(form, text) for text in good + bad] == [True] * len(good) + [False] * len(bad)
    for text in good:
        _, words, calls = read(ChatParts(tools=written), [text])
        assert ("add" in text or "wie" in text) == bool(calls) and words in ("", "Well.")
        assert all(name in ("add", "wie spät?") and isinstance(json.loads(given), dict) for name, given in calls)


@pytest.mark.parametrize("choice", ["none", "auto", None])
def test_without_a_choice_nothing_is_held(choice: Choice | None) -> None:
    assert tool_form([NOW], choice, "hermes", parallel=True) is None


@pytest.mark.parametrize(
    ("choice", "written", "message"),
    [
        ({"type": "function", "function": {"name": "sub"}}, "hermes", "'sub' is none of the tools"),
        ({"type": "tool"}, "hermes", "wanted 'none', 'auto'"), ("auto", "llama3_json", "use 'required'"),
    ],
)  # fmt: skip
def test_what_is_no_choice_is_refused(choice: Choice, written: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tool_form([ADD, NOW], choice, written, parallel=True)


@pytest.mark.parametrize("form", [{"choice": ["yes"]}, {"regex": "yes"}, {"grammar": 'start: "yes"'}])
@given(thought=st.text(max_size=20).filter(lambda text: "</think>" not in text + "<"))
def test_a_form_begins_after_the_reasoning(form: dict[str, Any], thought: str) -> None:
    opened = StructuredOutputsParams(**form, reasoning=("", "</think>"))
    may_open = StructuredOutputsParams(**form, reasoning=("<think>", "</think>"))
    assert holds(opened, f"{thought}</think>\n\nyes") and not holds(opened, f"{thought}</think>\n\nno")
    assert holds(may_open, f"<think>{thought}</think>yes") and holds(may_open, "yes") and not holds(may_open, "no")


TEMPLATE = (
    "{% if tools %}Call as <tool_call>{{ tools | tojson }}</tool_call>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.slow
def test_the_client_gets_the_calls_it_requires(demo_model: Path, tmp_path: Path) -> None:
    (tmp_path / "hermes.jinja").write_text(TEMPLATE)
    tools: list[Any] = [{"type": "function", "function": ADD}, {"type": "function", "function": NOW}]
    asked: dict[str, Any] = {
        "model": "demo", "messages": [{"role": "user", "content": "Add one."}], "tools": tools, "temperature": 0,
        "max_tokens": 64,
    }  # fmt: skip
    options = [
        "--served-model-name",
        "demo",
        "--max-model-len",
        "512",
        "--chat-template",
        str(tmp_path / "hermes.jinja"),
    ]
    with run_command("--model", str(demo_model), *options) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        answer = client.chat.completions.create(**asked, tool_choice="required", parallel_tool_calls=False)
        (call,) = answer.choices[0].message.tool_calls or ()
        assert answer.choices[0].finish_reason == "tool_calls" and not answer.choices[0].message.content
        assert call.function.name in ("add", "wie spät?") and isinstance(json.loads(call.function.arguments), dict)
        deltas = [c.choices[0].delta for c in client.chat.completions.create(**asked, tool_choice=ONE, stream=True)]
        pieces = [call.function for delta in deltas for call in delta.tool_calls or () if call.function]
        assert [piece.name for piece in pieces if piece.name] == ["add"]
        assert set(json.loads("".join(piece.arguments or "" for piece in pieces))) == {"a"}
        with pytest.raises(openai.BadRequestError, match="none of the tools"):
            client.chat.completions.create(**asked, tool_choice={"type": "function", "function": {"name": "sub"}})
        with pytest.raises(openai.BadRequestError, match="wanted one of them"):
            client.chat.completions.create(**asked, tool_choice=ONE, response_format={"type": "json_object"})
