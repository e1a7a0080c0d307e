"""Fields of requests as clients send them, and of answers as clients read them, without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from seamwise.runtime.sampling.logprob import Logprob
from seamwise.runtime.serve.chat_parts import ChatParts
from seamwise.runtime.serve.http.chat_answer import _logprobs as chat_logprobs
from seamwise.runtime.serve.http.chat_schema import ChatRequest
from seamwise.runtime.serve.http.routes.completions import CompletionRequest, _logprobs
from seamwise.runtime.serve.http.routes.completions import _Answer as Completions
from seamwise.runtime.serve.http.routes.generate import _row as token_rows
from seamwise.runtime.serve.http.routes.responses import ResponsesRequest, _Answer
from seamwise.runtime.serve.http.schema import Body
from seamwise.runtime.serve.process.messages import Delta

SAID = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}, "index": 0}]}


@pytest.mark.parametrize(
    ("kind", "needed"),
    [
        (CompletionRequest, {"prompt": "a"}), (ChatRequest, {"messages": [{"role": "user", "content": "a"}]}),
        (ResponsesRequest, {"input": "a"}),
    ],
)  # fmt: skip
def test_null_is_the_default_of_every_field(kind: type[Body], needed: dict[str, Any]) -> None:
    given = {name: None for name in kind.model_fields} | needed
    got, plain = kind.model_validate(given), kind.model_validate(needed)
    for name, field in kind.model_fields.items():
        if type(None) in get_args(field.annotation):  # which mean something by null: no limit of tokens
            assert getattr(got, name) is None or name in needed
        else:
            assert getattr(got, name) == getattr(plain, name)


def test_a_streamed_calls_index_may_be_sent_back() -> None:
    (message,) = ChatRequest.model_validate({"messages": [SAID]}).messages
    assert message.as_template_reads()["tool_calls"] == [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    ]


def test_tokens_of_one_spelling_are_told_apart() -> None:
    """The sampled one's log probability is the one that stands under its text."""
    rows = [{5: Logprob(-0.5, 2, ""), 7: Logprob(-0.1, 1, "a"), 9: Logprob(-4.0, 3, "")}, {3: Logprob(-1.0, 1, "b")}]
    got = _logprobs(Delta("x", 0, "b", [5, 3], logprobs=rows), rows, 4, 3)
    assert got["top_logprobs"] == [{"": -0.5, "a": -0.1, "token_id:9": -4.0}, {"b": -1.0}]
    assert (got["tokens"], got["token_logprobs"], got["text_offset"]) == (["", "b"], [-0.5, -1.0], [4, 4])


def chat(**asked: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "a"}], "logprobs": True, **asked})


def test_as_many_top_logprobs_as_asked_for_whatever_the_tokens_rank() -> None:
    """One more is in the row where the sampled token is none of them."""
    for most in range(4):
        for rank in range(1, 6):
            row = {i: Logprob(-float(i), i, str(i)) for i in {rank, *range(1, most + 1)}}
            (got,) = chat_logprobs(Delta("x", 0, "", [rank], logprobs=[row]), chat(top_logprobs=most))
            assert got["token"] == str(rank)
            assert [one["token"] for one in got["top_logprobs"]] == [str(i) for i in range(1, most + 1)]
            asked = chat(logprob_token_ids=[2, 4])
            row = {i: Logprob(-float(i), i, str(i)) for i in (rank, 2, 4)}
            (got,) = chat_logprobs(Delta("x", 0, "", [rank], logprobs=[row]), asked)
            assert [one["token"] for one in got["top_logprobs"]] == ["2", "4"]


def test_a_token_stands_where_it_does_though_its_text_is_held_back() -> None:
    """As a tail is that may become a stop string: the stream's offsets are the whole answer's."""
    words, shown = {1: "one, ", 2: "two, ", 3: "three"}, ("one", ", two", ", three")
    rows = [{token: Logprob(-1.0, 1, word)} for token, word in words.items()]
    body = CompletionRequest(prompt="a", logprobs=0, n=2)
    for index, deltas in enumerate(
        (
            [Delta("x", 0, "".join(shown), [*words], logprobs=rows)],
            [Delta("x", 1, text, [token], logprobs=[row]) for text, token, row in zip(shown, words, rows, strict=True)],
        )
    ):
        answer = Completions(SimpleNamespace(body=body, name="x", model="m"), [""])  # type: ignore[arg-type]
        told = [offset for delta in deltas for offset in answer.choice(0, delta)["logprobs"]["text_offset"]]
        assert told == [0, 5, 10], index


def test_what_cannot_come_has_a_number_too() -> None:
    """JSON has no infinity, and null is no log probability."""
    row = {7: Logprob(0.0, 1, "a"), 9: Logprob(float("-inf"), 2, "b")}
    delta = Delta("x", 0, "a", [7], logprobs=[row])
    assert _logprobs(delta, [row], 0, 2)["top_logprobs"] == [{"a": 0.0, "b": -9999.0}]
    assert chat_logprobs(delta, chat(top_logprobs=2))[0]["top_logprobs"][1]["logprob"] == -9999.0
    assert token_rows(row) == [
        {"token_id": 7, "logprob": 0.0, "rank": 1}, {"token_id": 9, "logprob": -9999.0, "rank": 2},
    ]  # fmt: skip


ANSWERS = {
    "thought": ("<think>Hm, 4.</think>\nIt is 4.", ("Hm, 4.", "It is 4.")),
    "words": ("It is 4.", (None, "It is 4.")),
    "cut in the thought": ("<think>Hm</thi", ("Hm</thi", None)),
    "nothing": ("", (None, "")),
}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_response_has_reasoning_as_an_item_of_its_own(name: str, reason: str) -> None:
    """Whole, and in events that OpenAI's client understands and that add up to the same."""
    text, (thought, said) = ANSWERS[name]

    async def collect(step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        pieces = [text[i : i + step] for i in range(0, len(text), step)] or [""]
        deltas = [Delta("resp-1", 0, piece, [1]) for piece in pieces]
        deltas[-1].finish_reason = reason
        whole = await _Answer(*asked([Delta("resp-1", 0, text, [1], finish_reason=reason)])).whole()
        events = [one async for one in _Answer(*asked(deltas)).events()]
        return json.loads(bytes(whole.body)), [json.loads(one.partition(b"data: ")[2]) for one in events]

    def asked(deltas: list[Delta]) -> tuple[Any, ResponsesRequest, ChatParts]:
        async def each() -> AsyncIterator[tuple[int, Delta]]:
            for delta in deltas:
                yield 0, delta

        async def whole() -> dict[int, Delta]:
            return {0: deltas[0]}

        usage = {
            "prompt_tokens": 3,
            "completion_tokens": 4,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        work = SimpleNamespace(name="resp-1", model="m", usage=lambda: usage, deltas=each, whole=whole)
        return work, ResponsesRequest(input="2 + 2?"), ChatParts(reasoning=("<think>", "</think>"))

    for step in (1, 3, 100):
        body, events = asyncio.run(collect(step))
        response = Response.model_validate(body)
        shown = {item.type: "".join(part.text for part in item.content or ()) for item in response.output}  # type: ignore[union-attr]
        assert (shown.get("reasoning"), shown.get("message")) == (thought, said) and response.output_text == (
            said or ""
        )
        assert response.status == {"stop": "completed", "length": "incomplete"}[reason]
        assert [item.status for item in response.output][-1] == response.status  # type: ignore[union-attr]
        for number, one in enumerate(events):
            assert TypeAdapter(ResponseStreamEvent).validate_python(one).sequence_number == number
        ends = [one["item"] for one in events if one["type"] == "response.output_item.done"]
        assert ends == body["output"] == events[-1]["response"]["output"]
        for number, item in enumerate(ends):
            places = [
                one["output_index"]
                for one in events
                if item["id"] in (one.get("item_id"), one.get("item", {}).get("id"))
            ]
            assert {*places} == {number}
            parts = [one["delta"] for one in events if "delta" in one and one["item_id"] == item["id"]]
            assert "".join(parts) == item["content"][0]["text"]
