"""POST /v1/chat/completions: answer a conversation; and the same conversation rendered as text and ids."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from seamwise.runtime.sampling.params import SamplingParams
from seamwise.runtime.serve.chat_parts import ChatParts, reasoning_marks, tool_format
from seamwise.runtime.serve.http.chat_answer import ChatAnswer
from seamwise.runtime.serve.http.chat_schema import ChatRequest, Template
from seamwise.runtime.serve.http.serving import Work
from seamwise.runtime.serve.http.sse import json_response
from seamwise.runtime.serve.prompts import Prompts
from seamwise.runtime.serve.tool_choice import tool_form

from .describe import ASKS, GENERATES

router = APIRouter()


@router.post("/v1/chat/completions", responses=GENERATES, response_class=Response)
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer the conversation, n times; one answer, or events with stream=true."""
    work = await Work.of(body, request, "chatcmpl")
    most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    params = body.sampling(work.llm.default_sampling, max_tokens=most, logprobs=body.num_logprobs())
    tools = _tools(body, work.prompts)
    text, ids = await asyncio.to_thread(rendered, body, work, with_tools=tools is not None)
    marks = reasoning_marks(work.prompts.templates.get("default", ""))
    thinking = marks is not None and text.rstrip().endswith(marks[0])
    params = _formed(body, params, tools, ("", marks[1]) if marks and thinking else marks)
    await work.submit([(text, ids)], params)

    def parts() -> ChatParts:
        return ChatParts(tools=tools, reasoning=marks, thinking=thinking)

    answer = ChatAnswer(work, parts, body.messages[-1].text() if body.echo else "")
    return await work.answered(answer.whole, answer.events)


class RenderRequest(ChatRequest):
    """The body of /v1/chat/completions; what belongs to sampling changes nothing here."""


@router.post("/v1/chat/completions/render", responses=ASKS, response_class=Response)
async def render(body: RenderRequest, request: Request) -> Response:
    """Return the text and ids that /v1/chat/completions would continue."""
    work = await Work.of(body, request)
    tools = _tools(body, work.prompts)
    text, ids = await asyncio.to_thread(rendered, body, work, with_tools=tools is not None)
    return json_response({"model": work.model, "prompt": text, "prompt_token_ids": ids, "token_ids": ids})


def _tools(body: ChatRequest, prompts: Prompts) -> str | None:
    """Return how this request's calls are written, None where it wants none; ValueError for what is not served."""
    if not body.tools:
        if body.tool_choice not in (None, "none", "auto"):
            raise ValueError(f"tool_choice={body.tool_choice!r}: there are no tools; give some, or leave it out")
        return None
    if body.tool_choice == "none":
        return None
    source = prompts.templates.get("tool_use", prompts.templates.get("default", ""))
    form = tool_format(source)
    if form is None:
        raise ValueError(
            "tools: this model's chat template takes none, or writes calls otherwise than in JSON; leave them out"
        )
    return form


def _formed(
    body: ChatRequest, params: SamplingParams, tools: str | None, reasoning: tuple[str, str] | None
) -> SamplingParams:
    """Return the params with the form that tool_choice asks for; a form asked for begins after the reasoning."""
    form = params.structured_outputs
    if tools is not None and body.tools:
        functions = [tool.function.model_dump(exclude_none=True) for tool in body.tools]
        called = tool_form(functions, body.tool_choice, tools, parallel=body.parallel_tool_calls is not False)
        if called is not None and form is not None:
            raise ValueError("tool_choice and response_format both say what the answer looks like; wanted one of them")
        form = called or form
    return params if form is None else replace(params, structured_outputs=replace(form, reasoning=reasoning))


def rendered(body: Template, work: Work, *, with_tools: bool) -> tuple[str, list[int]]:
    """Return a conversation's text and ids. Raises ValueError for what the template does not take."""
    if body.chat_template is not None and not work.state.settings.trust_request_chat_template:
        raise ValueError(
            "chat_template: templates from requests are refused; start the server with trust_request_chat_template"
        )
    more: dict[str, Any] = dict(body.chat_template_kwargs or {})
    if taken := {"messages", "documents"} & more.keys():
        raise ValueError(f"chat_template_kwargs: {min(taken)} has a field of its own; use that")
    if body.documents is not None:
        more["documents"] = body.documents
    if body.reasoning_effort is not None:
        more["reasoning_effort"] = body.reasoning_effort
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] if with_tools else None
    text = work.prompts.render(
        [message.as_template_reads() for message in body.messages], chat_template=body.chat_template, tools=tools,
        continue_final_message=body.continue_final_message, chat_template_kwargs=more,
        add_generation_prompt=(
            not body.continue_final_message if body.add_generation_prompt is None else body.add_generation_prompt
        ),
    )  # fmt: skip
    ids = work.prompts.encode(text, add_special_tokens=body.add_special_tokens)
    if not ids:
        raise ValueError("messages: the chat template renders them to nothing; wanted text")
    return text, ids
