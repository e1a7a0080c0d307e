"""From deltas to OpenAI's chat objects, whole or as events."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Response

from seamwise.runtime.serve.chat_parts import ChatParts, Part
from seamwise.runtime.serve.process.messages import Delta, TokenLogprob

from .chat_schema import ChatRequest
from .serving import Work
from .sse import DONE, event, json_response


class ChatAnswer:
    """One chat request's answer.

    parts   makes the reader of one choice's text
    prefix  text that each answer starts with (echo)
    """

    def __init__(
        self, body: ChatRequest, request_id: str, model: str, parts: Callable[[], ChatParts], prefix: str = ""
    ) -> None:
        self._body, self._prefix = body, prefix
        self._head = {"id": request_id, "created": int(time.time()), "model": model}
        self._parts = [parts() for _ in range(body.n)]

    async def whole(self, work: Work) -> Response:
        """Return the answer when all is done."""
        choices = []
        for (_, i), delta in (await work.whole()).items():
            choice: dict[str, Any] = {
                "index": i, "message": self._message(self._read(delta)),
                "logprobs": {"content": _logprobs(delta.logprobs)} if self._body.logprobs else None,
                "finish_reason": self._reason(i, delta), "stop_reason": delta.stop_reason,
            }  # fmt: skip
            if self._body.return_token_ids:
                choice["token_ids"] = delta.token_ids
            choices.append(choice)
        body = {**self._head, "object": "chat.completion", "choices": choices, "usage": work.usage()}
        return json_response(body)

    async def events(self, work: Work) -> AsyncIterator[bytes]:
        """Yield each delta as an event, the role first."""
        options, begun = self._body.stream_options, set[int]()
        head = {**self._head, "object": "chat.completion.chunk"}
        running = options is not None and options.continuous_usage_stats
        async for _, delta in work.deltas():
            usage = {"usage": work.usage()} if running else {}
            if delta.index not in begun:
                begun.add(delta.index)
                first = {"role": "assistant", "content": self._prefix}
                yield event({**head, "choices": [_chunk(delta.index, first)], **usage})
            pieces = [self._piece(part) for part in self._read(delta)]
            if not pieces and (delta.finish_reason or self._body.logprobs or self._body.return_token_ids):
                pieces = [{}]
            for number, piece in enumerate(pieces):
                choice = _chunk(delta.index, piece)
                if number == len(pieces) - 1:
                    choice["finish_reason"] = self._reason(delta.index, delta)
                    if delta.finish_reason:
                        choice["stop_reason"] = delta.stop_reason
                if number == 0 and self._body.logprobs:
                    choice["logprobs"] = {"content": _logprobs(delta.logprobs)}
                if number == 0 and self._body.return_token_ids:
                    choice["token_ids"] = delta.token_ids
                yield event({**head, "choices": [choice], **usage})
        if options is not None and options.include_usage:
            yield event({**head, "choices": [], "usage": work.usage()})
        yield DONE

    def _read(self, delta: Delta) -> list[Part]:
        reader = self._parts[delta.index]
        parts = reader.feed(delta.text)
        if delta.finish_reason is not None:
            parts += reader.end()
        if self._body.parallel_tool_calls is False:
            parts = [part for part in parts if part.call == 0]
        if not self._body.include_reasoning:
            parts = [part for part in parts if part.kind != "reasoning"]
        return parts

    def _reason(self, index: int, delta: Delta) -> str | None:
        return "tool_calls" if delta.finish_reason == "stop" and self._parts[index].num_calls else delta.finish_reason

    @staticmethod
    def _piece(part: Part) -> dict[str, Any]:
        if part.kind == "text":
            return {"content": part.text}
        if part.kind == "reasoning":
            return {"reasoning": part.text, "reasoning_content": part.text}
        call: dict[str, Any] = {"index": part.call, "function": {"arguments": part.text}}
        if part.kind == "call":
            call |= {"id": part.call_id, "type": "function", "function": {"name": part.text, "arguments": ""}}
        return {"tool_calls": [call]}

    def _message(self, parts: list[Part]) -> dict[str, Any]:
        text = self._prefix + "".join(part.text for part in parts if part.kind == "text")
        thought = "".join(part.text for part in parts if part.kind == "reasoning")
        calls: dict[int, dict[str, Any]] = {}
        for part in parts:
            if part.kind == "call":
                function = {"name": part.text, "arguments": ""}
                calls[part.call] = {"id": part.call_id, "type": "function", "function": function}
            elif part.kind == "arguments":
                calls[part.call]["function"]["arguments"] += part.text
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if thought:
            message |= {"reasoning": thought, "reasoning_content": thought}
        if calls:
            message["tool_calls"] = list(calls.values())
        return message


def _chunk(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _logprobs(rows: list[list[TokenLogprob]] | None) -> list[dict[str, Any]]:
    """Return OpenAI's content of logprobs: each token with its bytes, and the most likely ones by rank."""
    found = []
    for row in rows or ():
        best = sorted(row, key=lambda one: one.rank)
        asked = len(row) - 1 if row[0].rank > len(row) - 1 else len(row)
        top = [_token(one) for one in best[: max(asked, 0)]]
        found.append({**_token(row[0]), "top_logprobs": top})
    return found


def _token(one: TokenLogprob) -> dict[str, Any]:
    return {"token": one.spelled, "logprob": one.logprob, "bytes": list(one.spelled.encode())}
