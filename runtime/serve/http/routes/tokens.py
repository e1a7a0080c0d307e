"""POST /tokenize and /detokenize: text and ids, without the model."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response

from seamwise.runtime.serve.http.chat_schema import Template
from seamwise.runtime.serve.http.schema import Body, TokenId
from seamwise.runtime.serve.http.serving import Work
from seamwise.runtime.serve.http.sse import json_response

from .chat import rendered
from .describe import ASKS

router = APIRouter()


class TokenizeRequest(Body):
    """Text to be made ids."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = False


class TokenizeChatRequest(Template):
    """A conversation to be made ids."""

    model: str | None = None
    return_token_strs: bool | None = False


class DetokenizeRequest(Body):
    """Ids to be made text."""

    model: str | None = None
    tokens: list[TokenId]
    skip_special_tokens: bool = False


@router.post("/tokenize", responses=ASKS, response_class=Response)
async def tokenize(body: TokenizeRequest | TokenizeChatRequest, request: Request) -> Response:
    """Return the ids of a prompt, or of a conversation by the chat template."""
    work = await Work.of(body, request)
    prompts = work.prompts
    if isinstance(body, TokenizeRequest):
        ids = await asyncio.to_thread(prompts.encode, body.prompt, add_special_tokens=body.add_special_tokens)
    else:
        _, ids = await asyncio.to_thread(rendered, body, work, with_tools=bool(body.tools))
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": prompts.info.max_model_len, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = prompts.pieces(ids)
    return json_response(answer)


@router.post("/detokenize", responses=ASKS, response_class=Response)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """Return the text of ids."""
    prompts = (await Work.of(body, request)).prompts
    text = await asyncio.to_thread(prompts.decode, body.tokens, skip_special_tokens=body.skip_special_tokens)
    return json_response({"prompt": text})
