"""Every error as OpenAI's clients read it: {"error": {"message", "type", "param", "code"}}; never a traceback."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from seamwise.runtime.build.arguments import nearest
from seamwise.runtime.serve.process.streams import CallFailed, EngineError, RequestFailed, Unsupported

logger = logging.getLogger("seamwise.http")
_TYPES = {
    400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 405: "MethodNotAllowedError",
    409: "ConflictError", 413: "RequestTooLargeError", 415: "UnsupportedMediaTypeError", 429: "RateLimitError",
    500: "InternalServerError", 501: "NotImplementedError", 503: "ServiceUnavailableError",
}  # fmt: skip
_ELSEWHERE = {  # fields that clients of OpenAI and vLLM know, and what there is instead
    "best_of": "it does not exist any more; use n",
    "suffix": "text cannot be put into a gap; put it into the prompt",
    "guided_json": "use response_format",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "max_token": "did you mean max_tokens?",
}


class ApiError(Exception):
    """An answer that is an error. retry_s: when the client may try again, for 429 and 503."""

    def __init__(self, status: int, message: str, param: str | None = None, retry_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.retry_s = status, message, param, retry_s


class ClientGone(Exception):
    """The client closed the connection, broke the protocol, or took nothing for too long."""


_STATUSES: dict[type[Exception], int] = {  # the message is for the client
    ValueError: 400,
    CallFailed: 409,
    RequestFailed: 500,
    Unsupported: 501,
    EngineError: 503,
}


def error_body(error: ApiError) -> dict[str, Any]:
    """Return the JSON of an error."""
    kind = _TYPES.get(error.status, "APIError")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.status}}


def error_response(error: ApiError) -> Response:
    headers = {} if error.retry_s is None else {"Retry-After": str(error.retry_s)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(msgspec.json.encode(error_body(error)), error.status, headers, "application/json")


def as_api_error(error: Exception) -> ApiError:
    """Return what a client is told of an exception. One that nobody foresaw is logged, and told without its text."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ClientGone):
        return ApiError(499, "the client is gone")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    for kind, status in _STATUSES.items():
        if isinstance(error, kind):
            return ApiError(status, str(error), retry_s=5 if status == 503 else None)
    logger.error("an error that was not foreseen", exc_info=error)
    return ApiError(500, "the server met an error of its own; its log says which")


def add_handlers(app: FastAPI) -> None:
    """Let the application answer every exception in this form."""

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError):
            return error_response(_invalid(error, request))
        return error_response(as_api_error(error))

    for kind in (RequestValidationError, HTTPException, ApiError, *_STATUSES, Exception):
        app.add_exception_handler(kind, answer)


def _invalid(error: RequestValidationError, request: Request) -> ApiError:
    """Say what is wrong with a body: the first field, what it was, what was wanted."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:] if not str(part).startswith("function-")) or "body"
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])
        hint = nearest(name, _fields_of(request)) or "leave it out"
        return ApiError(400, f"{where}: there is no such field; {_ELSEWHERE.get(name, hint)}", where)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    got = repr(first.get("input"))
    return ApiError(400, f"{where}: {first['msg']}, got {got[:80]}{'…' if len(got) > 80 else ''}", where)


def _fields_of(request: Request) -> list[str]:
    field = getattr(request.scope.get("route"), "body_field", None)
    model = getattr(getattr(field, "field_info", None), "annotation", None)
    return list(getattr(model, "model_fields", {}))
