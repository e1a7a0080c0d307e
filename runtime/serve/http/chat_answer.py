"""From deltas to OpenAI's chat objects, whole or as events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from seamwise.runtime.sampling.logprob import Logprob
from seamwise.runtime.serve.chat_parts import ChatParts, Part
from seamwise.runtime.serve.process.messages import Delta

from .answers import Choices, as_number, spelled
from .chat_schema import ChatRequest
from .serving import Work


class ChatAnswer(Choices):
    """One chat request's answer.

    parts   makes the reader of one choice's text
    prefix  text that each answer starts with (echo)
    """

    whole_kind, event_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, work: Work, parts: Callable[[], ChatParts], prefix: str) -> None:
        super().__init__(work)
        self._prefix, self._begun = prefix, set[int]()
        self._parts = [parts() for _ in range(self.body.n)]

    def choice(self, prompt: int, delta: Delta) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": delta.index, "message": self._message(self._read(delta)),
            "logprobs": {"content": _logprobs(delta, self.body)} if self.body.logprobs else None,
            "finish_reason": self._reason(delta), "stop_reason": delta.stop_reason,
        }  # fmt: skip
        return choice | ({"token_ids": delta.token_ids} if self.body.return_token_ids else {})

    def parts(self, prompt: int, delta: Delta) -> Iterator[dict[str, Any]]:
        """Yield the role first, then each piece; what belongs to the whole delta stands in the first or last one."""
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            yield _chunk(delta.index, {"role": "assistant", "content": self._prefix})
        pieces = [self._piece(part) for part in self._read(delta)]
        if not pieces and (delta.finish_reason or self.body.logprobs or self.body.return_token_ids):
            pieces = [{}]
        for number, piece in enumerate(pieces):
            choice = _chunk(delta.index, piece)
            if number == len(pieces) - 1:
                choice["finish_reason"] = self._reason(delta)
                if delta.finish_reason:
                    choice["stop_reason"] = delta.stop_reason
            if number == 0 and self.body.logprobs:
                choice["logprobs"] = {"content": _logprobs(delta, self.body)}
            if number == 0 and self.body.return_token_ids:
                choice["token_ids"] = delta.token_ids
            yield choice

    def _read(self, delta: Delta) -> list[Part]:
        reader = self._parts[delta.index]
        parts = reader.feed(delta.text)
        if delta.finish_reason is not None:
            parts += reader.end()
        if self.body.parallel_tool_calls is False:
            parts = [part for part in parts if part.call == 0]
        if not self.body.include_reasoning:
            parts = [part for part in parts if part.kind != "reasoning"]
        return parts

    def _reason(self, delta: Delta) -> str | None:
        called = delta.finish_reason == "stop" and self._parts[delta.index].num_calls
        return "tool_calls" if called else delta.finish_reason

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
        calls = []
        for call in [part for part in parts if part.kind == "call"]:
            arguments = "".join(part.text for part in parts if part.kind == "arguments" and part.call == call.call)
            function = {"name": call.text, "arguments": arguments}
            calls.append({"id": call.call_id, "type": "function", "function": function})
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if thought:
            message |= {"reasoning": thought, "reasoning_content": thought}
        if calls:
            message["tool_calls"] = calls
        return message


def _chunk(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _logprobs(delta: Delta, asked: ChatRequest) -> list[dict[str, Any]]:
    """Return OpenAI's content of logprobs: each token with its bytes, and by rank the most likely ones, or those asked
    for by id. A row has the token itself too, which may be none of them."""
    found, ids = [], asked.logprob_token_ids
    for token, row in zip(delta.token_ids, delta.logprobs or (), strict=False):
        best = sorted(row.items(), key=lambda one: one[1].rank)
        top = best[: asked.top_logprobs or 0] if ids is None else [one for one in best if one[0] in ids]
        found.append({**_token(token, row[token]), "top_logprobs": [_token(*one) for one in top]})
    return found


def _token(token: int, its: Logprob) -> dict[str, Any]:
    text = spelled(token, its)
    return {"token": text, "logprob": as_number(its), "bytes": list(text.encode())}
