"""POST /v1/responses: OpenAI's newer way to ask for text. Nothing is stored, so a conversation is sent whole.

Source: https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from seamwise.runtime.sampling.params import SamplingParams
from seamwise.runtime.serve.chat_parts import ChatParts, Part, reasoning_marks
from seamwise.runtime.serve.http.schema import Body, Labels, Whole
from seamwise.runtime.serve.http.serving import Work
from seamwise.runtime.serve.http.sse import event, json_response
from seamwise.runtime.serve.process.messages import Delta

from .describe import GENERATES

router = APIRouter()
_TEXTS = {"text": "output_text", "reasoning": "reasoning_text"}  # what events are called, by ChatParts' kinds
_REASONING: dict[str, Any] = {"type": "reasoning", "summary": []}


class InputText(Body):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputItem(Body):
    type: Literal["message"] = "message"
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[InputText]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class TextFormat(Body):
    type: Literal["text"]


class TextOptions(Body):
    format: TextFormat | None = None


class ResponsesRequest(Labels):
    """OpenAI's body of /v1/responses, as far as it is text."""

    model: str | None = None
    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1e6)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Whole | None = None
    stream: bool | None = False
    text: TextOptions | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    truncation: Literal["disabled"] | None = None

    def messages(self) -> list[dict[str, Any]]:
        """Return the conversation as the chat template reads it."""
        found: list[dict[str, Any]] = []
        if self.instructions is not None:
            found.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*found, {"role": "user", "content": self.input}]
        for item in self.input:
            parts = item.content if isinstance(item.content, list) else []
            text = item.content if isinstance(item.content, str) else "\n".join(part.text for part in parts)
            found.append({"role": item.role, "content": text})
        return found


@router.post("/v1/responses", responses=GENERATES, response_class=Response)
async def respond(body: ResponsesRequest, request: Request) -> Response:
    """Answer the input; one answer, or OpenAI's named events with stream=true."""
    work = await Work.of(body, request, "resp")
    asked = {"temperature": body.temperature, "top_p": body.top_p, "seed": body.seed}
    given = {key: value for key, value in asked.items() if value is not None}
    params = SamplingParams(**{**work.llm.default_sampling, **given, "max_tokens": body.max_output_tokens})
    text = await asyncio.to_thread(work.prompts.render, body.messages())
    ids = await asyncio.to_thread(work.prompts.encode, text, add_special_tokens=False)
    await work.submit([(text, ids)], params)
    marks = reasoning_marks(work.prompts.templates.get("default", ""))
    thinking = marks is not None and text.rstrip().endswith(marks[0])
    answer = _Answer(work, body, ChatParts(reasoning=marks, thinking=thinking))
    return await work.answered(answer.whole, answer.events)


class _Answer:
    """Turns deltas into a response object, or the events that build it up: an item of reasoning, where there is any,
    and a message."""

    def __init__(self, work: Work, body: ResponsesRequest, reader: ChatParts) -> None:
        self._work, self._reader = work, reader
        self._texts: dict[str, str] = {}  # of each item, by its kind
        self._head: dict[str, Any] = {
            "id": work.name, "object": "response", "created_at": int(time.time()), "model": work.model,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "metadata": body.metadata,
            "temperature": body.temperature, "top_p": body.top_p, "tools": [], "tool_choice": "auto",
            "parallel_tool_calls": False, "error": None, "previous_response_id": None,
        }  # fmt: skip
        self._number = -1

    async def whole(self) -> Response:
        (delta,) = (await self._work.whole()).values()
        for part in self._read(delta):
            self._texts[part.kind] = self._texts.get(part.kind, "") + part.text
        return json_response(self._finished(delta.finish_reason))

    async def events(self) -> AsyncIterator[bytes]:
        reason = None
        async for _, delta in self._work.deltas():
            if self._number < 0:
                begun = {**self._head, "status": "in_progress", "output": [], "incomplete_details": None, "usage": None}
                yield self._event("response.created", response=begun)
                yield self._event("response.in_progress", response=begun)
            reason = delta.finish_reason
            for part in self._read(delta):
                if part.kind not in self._texts:
                    for one in [*self._closing("completed"), *self._opening(part.kind)]:
                        yield one
                self._texts[part.kind] += part.text
                yield self._of_text(part.kind, "delta", delta=part.text)
        for one in self._opening("text") if not self._texts else []:
            yield one
        whole = self._finished(reason)
        for one in self._closing(whole["status"]):
            yield one
        yield self._event(f"response.{whole['status']}", response=whole)

    def _read(self, delta: Delta) -> list[Part]:
        parts = self._reader.feed(delta.text)
        return parts if delta.finish_reason is None else [*parts, *self._reader.end()]

    def _opening(self, kind: str) -> list[bytes]:
        """Return the events that begin an item."""
        self._texts[kind] = ""
        place = self._place(kind)
        return [
            self._event("response.output_item.added", output_index=place["output_index"], item=self._item(kind, "")),
            self._event("response.content_part.added", **place, part=_part(kind, "")),
        ]

    def _closing(self, status: str) -> list[bytes]:
        """Return the events that end the last item, if one is open."""
        if not self._texts:
            return []
        kind, text = [*self._texts.items()][-1]
        place = self._place(kind)
        return [
            self._of_text(kind, "done", text=text),
            self._event("response.content_part.done", **place, part=_part(kind, text)),
            self._event("response.output_item.done", output_index=place["output_index"], item=self._item(kind, status)),
        ]

    def _place(self, kind: str) -> dict[str, Any]:
        return {"item_id": self._item_id(kind), "output_index": [*self._texts].index(kind), "content_index": 0}

    def _of_text(self, kind: str, end: str, **fields: Any) -> bytes:
        if kind == "text":
            fields["logprobs"] = []
        return self._event(f"response.{_TEXTS[kind]}.{end}", **self._place(kind), **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number, **fields}, kind)

    def _item_id(self, kind: str) -> str:
        return self._work.name.replace("resp-", "msg-" if kind == "text" else "rs-", 1)

    def _item(self, kind: str, status: str) -> dict[str, Any]:
        """Return an item with its text; with none while it has no status."""
        content = [_part(kind, self._texts[kind])] if status else []
        item = {"id": self._item_id(kind), "status": status or "in_progress", "content": content}
        return {**item, **({"type": "message", "role": "assistant"} if kind == "text" else _REASONING)}

    def _finished(self, reason: str | None) -> dict[str, Any]:
        status = "incomplete" if reason == "length" else "completed"
        if not self._texts:
            self._texts["text"] = ""
        usage, last = self._work.usage(), [*self._texts][-1]
        return {
            **self._head, "status": status,
            "output": [self._item(kind, status if kind == last else "completed") for kind in self._texts],
            "incomplete_details": {"reason": "max_output_tokens"} if reason == "length" else None,
            "usage": {
                "input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"],
                "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
                "total_tokens": usage["total_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
            },
        }  # fmt: skip


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "text":
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "reasoning_text", "text": text}
