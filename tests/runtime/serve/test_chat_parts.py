"""Reasoning, text and calls of tools are told apart alike however the text is cut into pieces."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamwise.runtime.serve.chat_parts import ChatParts, Part, tool_format

THINK = ("<think>", "</think>")
ARGUMENTS = '{"a": [1, "}\\""], "b": {"c": "</tool_call>"}}'
CALL = f'<tool_call>\n{{"name": "add", "arguments": {ARGUMENTS}}}\n</tool_call>'


def read(reader: ChatParts, pieces: list[str]) -> tuple[str, str, list[tuple[str, str]]]:
    """Return (reasoning, text, calls) of an answer that comes in these pieces."""
    parts: list[Part] = []
    for piece in pieces:
        parts += reader.feed(piece)
    parts += reader.end()
    calls: dict[int, list[str]] = {}
    for part in parts:
        if part.kind == "call":
            calls[part.call] = [part.text, ""]
        elif part.kind == "arguments":
            calls[part.call][1] += part.text
    kinds = {k: "".join(p.text for p in parts if p.kind == k) for k in ("reasoning", "text")}
    return kinds["reasoning"], kinds["text"], [(name, arguments) for name, arguments in calls.values()]


CASES: dict[str, tuple[ChatParts, str, tuple[str, str, list[str]]]] = {
    "words": (ChatParts(tools="hermes", reasoning=THINK), "2 < 3 <tool", ("", "2 < 3 <tool", [])),
    "call": (ChatParts(tools="hermes"), CALL, ("", "", ["add"])),
    "two calls": (ChatParts(tools="hermes"), f"Well.\n{CALL}\n{CALL}", ("", "Well.", ["add", "add"])),
    "thought": (ChatParts(reasoning=THINK), "<think>\nHm <b>.\n</think>\n\nYes", ("Hm <b>.\n", "Yes", [])),
    "thinking already": (ChatParts(reasoning=THINK, thinking=True), "Hm.</think>Yes", ("Hm.", "Yes", [])),
    "thought and call": (
        ChatParts(tools="hermes", reasoning=THINK), f"<think>I add.</think>\n{CALL}", ("I add.", "", ["add"]),
    ),
    "unfinished thought": (ChatParts(reasoning=THINK), "<think>Hm", ("Hm", "", [])),
    "no call": (ChatParts(tools="hermes"), "<tool_call>oh</tool_call>", ("", "<tool_call>oh</tool_call>", [])),
    "no arguments": (ChatParts(tools="hermes"), '<tool_call>{"name": "now"}</tool_call>', ("", "", ["now"])),
    "whole object": (
        ChatParts(tools="llama3_json"), '{"name": "add", "parameters": {"a": [1]}}', ("", "", ["add"]),
    ),
    "name last": (
        ChatParts(tools="hermes"), f'<tool_call>\n{{"arguments": {ARGUMENTS}, "name": "add"}}\n</tool_call>',
        ("", "", ["add"]),
    ),
    "arguments as text": (
        ChatParts(tools="hermes"),
        f'Well. <tool_call>{{"name": "add", "arguments": {json.dumps(ARGUMENTS)}}}</tool_call>\n{CALL}',
        ("", "Well.", ["add", "add"]),
    ),
    "null for arguments": (
        ChatParts(tools="hermes"), '<tool_call>{"name": "now", "arguments": null}</tool_call>', ("", "", ["now"]),
    ),
    "no name": (
        ChatParts(tools="hermes"), '<tool_call>{"a": 1}</tool_call> or', ("", '<tool_call>{"a": 1}</tool_call> or', []),
    ),
    "broken off": (ChatParts(tools="hermes"), '<tool_call>{"nam', ("", '<tool_call>{"nam', [])),
    "object with its type": (
        ChatParts(tools="llama3_json"), '{"type": "function", "name": "add", "parameters": {"a": [1]}}',
        ("", "", ["add"]),
    ),
    "several objects": (
        ChatParts(tools="llama3_json"),
        '{"name": "add", "parameters": {"a": [1]}}; {"type": "function", "name": "now", "parameters": {}}',
        ("", "", ["add", "now"]),
    ),
    "object and words": (
        ChatParts(tools="llama3_json"), '{"name": "add", "parameters": {"a": [1]}} is it', ("", "is it", ["add"]),
    ),
    "object and a separator": (
        ChatParts(tools="llama3_json"), '{"name": "add", "parameters": {"a": [1]}};\n', ("", "", ["add"]),
    ),
    "object broken off": (ChatParts(tools="llama3_json"), '{"name": "ad', ("", '{"name": "ad', [])),
    "no call, an object": (ChatParts(tools="llama3_json"), '{"name": "now"}', ("", '{"name": "now"}', [])),
    "thought and object": (
        ChatParts(tools="llama3_json", reasoning=THINK), '<think>Hm</think>\n{"name": "add", "parameters": {"a": [1]}}',
        ("Hm", "", ["add"]),
    ),
    "words after a call": (ChatParts(tools="hermes"), f"{CALL}\n Done. \nYes", ("", " Done. \nYes", ["add"])),
    "cut in a call's end": (ChatParts(tools="hermes"), CALL[:-3], ("", "", ["add"])),
    "a mark in a thought's place": (ChatParts(reasoning=THINK), "2 <think>", ("", "2 <think>", [])),
    "words, no object": (ChatParts(tools="llama3_json"), '{"nam": 3} is it', ("", '{"nam": 3} is it', [])),
    "no tools asked": (ChatParts(), CALL, ("", CALL, [])),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@given(cuts=st.sets(st.integers(1, 200), max_size=40))
def test_pieces_do_not_matter(case: str, cuts: set[int]) -> None:
    template, text, (reasoning, words, names) = CASES[case]
    reader = ChatParts(tools=template.tools, reasoning=template.reasoning, thinking=template.thinking)
    at = [0, *sorted(c for c in cuts if c < len(text)), len(text)]
    got = read(reader, [text[a:b] for a, b in itertools.pairwise(at)])
    assert got[0] == reasoning and got[1] == words
    assert [name for name, _ in got[2]] == names
    for name, arguments in got[2]:
        parsed = json.loads(arguments)
        assert name == "now" or parsed["a"][0] == 1
        assert template.tools != "hermes" or name == "now" or parsed["b"] == {"c": "</tool_call>"}


def test_arguments_come_before_the_call_ends() -> None:
    reader = ChatParts(tools="hermes")
    got = reader.feed('<tool_call>{"name": "add", "arguments": {"a": 1, "b"')
    assert [(p.kind, p.text) for p in got] == [("call", "add"), ("arguments", '{"a": 1, "b"')]


@pytest.mark.parametrize(
    ("written", "form"),
    [
        ('{"name": NAME, "arguments": ARGUMENTS}', "hermes"),
        ("<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>", None),
        ("NAME\n<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value>", None),
    ],
)
def test_only_calls_in_json_are_read(written: str, form: str | None) -> None:
    assert tool_format(f"{{% if tools %}}<tool_call>\n{written}\n</tool_call>{{% endif %}}") == form
