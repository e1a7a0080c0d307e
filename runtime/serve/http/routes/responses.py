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
from seamwise.runtime.serve.http.schema import Body, Labels, Whole
from seamwise.runtime.serve.http.serving import Work
from seamwise.runtime.serve.http.sse import event, json_response

from .describe import GENERATES

router = APIRouter()


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
    answer = _Answer(work, body)
    return await work.answered(answer.whole, answer.events)


class _Answer:
    """Turns deltas into a response object, or the events that build it up."""

    def __init__(self, work: Work, body: ResponsesRequest) -> None:
        self._work, self._item_id = work, work.name.replace("resp-", "msg-", 1)
        self._head: dict[str, Any] = {
            "id": work.name, "object": "response", "created_at": int(time.time()), "model": work.model,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "metadata": body.metadata,
            "temperature": body.temperature, "top_p": body.top_p, "tools": [], "tool_choice": "auto",
            "parallel_tool_calls": False, "error": None, "previous_response_id": None,
        }  # fmt: skip
        self._number = -1

    async def whole(self) -> Response:
        (delta,) = (await self._work.whole()).values()
        return json_response(self._finished(delta.text, delta.finish_reason))

    async def events(self) -> AsyncIterator[bytes]:
        text, reason, place = "", None, {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        async for _, delta in self._work.deltas():
            if reason is None and self._number < 0:
                begun = {**self._head, "status": "in_progress", "output": [], "incomplete_details": None, "usage": None}
                yield self._event("response.created", response=begun)
                yield self._event("response.in_progress", response=begun)
                yield self._event("response.output_item.added", output_index=0, item=self._item("", "in_progress"))
                yield self._event("response.content_part.added", **place, part=_part(""))
            text, reason = text + delta.text, delta.finish_reason
            if delta.text:
                yield self._event("response.output_text.delta", **place, delta=delta.text, logprobs=[])
        whole = self._finished(text, reason)
        yield self._event("response.output_text.done", **place, text=text, logprobs=[])
        yield self._event("response.content_part.done", **place, part=_part(text))
        yield self._event("response.output_item.done", output_index=0, item=whole["output"][0])
        yield self._event(f"response.{whole['status']}", response=whole)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number, **fields}, kind)

    def _item(self, text: str, status: str) -> dict[str, Any]:
        content = [_part(text)] if status != "in_progress" else []
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _finished(self, text: str, reason: str | None) -> dict[str, Any]:
        status = "incomplete" if reason == "length" else "completed"
        usage = self._work.usage()
        return {
            **self._head, "status": status, "output": [self._item(text, status)],
            "incomplete_details": {"reason": "max_output_tokens"} if reason == "length" else None,
            "usage": {
                "input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"],
                "total_tokens": usage["total_tokens"], "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens_details": {"reasoning_tokens": 0},
            },
        }  # fmt: skip


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
