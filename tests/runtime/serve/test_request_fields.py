"""Fields of requests as clients send them, and of answers as clients read them, without a server."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from seamwise.runtime.sampling.logprob import Logprob
from seamwise.runtime.serve.http.chat_schema import ChatRequest
from seamwise.runtime.serve.http.routes.completions import CompletionRequest, _logprobs
from seamwise.runtime.serve.http.routes.responses import ResponsesRequest
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
