"""How routes describe themselves in OpenAPI: every status that a client may meet, and the two kinds of answer."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class Cause(BaseModel):
    message: str
    type: str
    param: str | None
    code: int


class Error(BaseModel):
    error: Cause


_WHAT = {
    400: "What the request asks cannot be served; the message says why.",
    401: "No API key, or a wrong one.",
    404: "The model, or what the path names, is not here.",
    409: "The engine's state does not allow it now.",
    413: "The body is too long.",
    415: "The body is no JSON.",
    429: "Too many requests are in work; Retry-After says when to come again.",
    501: "The engine has no such ability.",
    503: "The engine is loading, restarting, full or shutting down; Retry-After says when to come again.",
}


def answers(*statuses: int, stream: bool = False, content: dict[str, Any] | None = None) -> dict[int | str, Any]:
    """Return the `responses` of a route that answers JSON, by events too, and these errors."""
    ok: dict[str, Any] = content or {"application/json": {"schema": {"type": "object"}}}
    if stream:
        ok = {**ok, "text/event-stream": {"schema": {"type": "string"}}}
    errors: dict[int | str, Any] = {s: {"description": _WHAT[s], "model": Error} for s in statuses}
    return {200: {"description": "The answer.", "content": ok}, **errors}


GENERATES = answers(400, 401, 404, 413, 415, 429, 501, 503, stream=True)
ASKS = answers(400, 401, 404, 413, 415, 503)
CONTROLS = answers(400, 401, 404, 409, 413, 415, 501, 503)
READS = answers(401, 503)
