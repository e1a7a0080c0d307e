"""What stands before every route: request ids, keys, the longest body, and no traceback to a client."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, ClientGone, as_api_error, error_response

logger = logging.getLogger("seamwise.access")
_OPEN = frozenset({"/", "/playground", "/health", "/health/ready", "/ping", "/static/page.css", "/static/page.js"})
_ID = re.compile(r"[\x21-\x7e]{1,128}")
_TRACE = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


class KeyCheck:
    """Whether a header carries one of the keys, in a time that depends on neither."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __call__(self, authorization: str | None) -> bool:
        scheme, _, given = (authorization or "").partition(" ")
        digest, found = _digest(given.strip()), not self._digests
        for one in self._digests:  # all of them, always
            found = hmac.compare_digest(one, digest) or found
        return found and (not self._digests or scheme.lower() == "bearer")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="replace")).digest()


class Guard:
    """The outermost ASGI application.

    refuse  says why no request is taken at all (the server is draining), or None
    """

    def __init__(
        self, app: ASGIApp, keys: Sequence[str], max_body_bytes: int, refuse: Callable[[str], ApiError | None]
    ) -> None:
        self._app, self._check, self._max = app, KeyCheck(keys), max_body_bytes
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        trace = _TRACE.fullmatch(headers.get("traceparent", ""))
        scope.setdefault("state", {})["request_id"] = request_id
        started_s, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            try:
                await send(message)
            except Exception as error:
                if "SERVER and state=" not in str(error):  # h11's words for a client that broke the protocol meanwhile
                    raise
                raise ClientGone from error

        try:
            self._admit(scope["path"], scope["method"], headers)
            await self._app(scope, self._counted(receive), answer)
        except Exception as error:
            if status == 0:
                await error_response(as_api_error(error))(scope, receive, answer)
        finally:
            elapsed_ms = 1e3 * (time.perf_counter() - started_s)
            logger.info(
                "%s %s %s %.1f ms request_id=%s%s", scope["method"], scope["path"], status or "disconnected",
                elapsed_ms, request_id, f" trace_id={trace[1]}" if trace else "",
            )  # fmt: skip

    def _admit(self, path: str, method: str, headers: Headers) -> None:
        if path not in _OPEN and method != "OPTIONS" and not self._check(headers.get("authorization")):
            raise ApiError(401, "this server wants an API key: send the header 'Authorization: Bearer KEY'")
        if (refusal := self._refuse(path)) is not None:
            raise refusal
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self._max:
            raise self._too_long()

    def _too_long(self) -> ApiError:
        return ApiError(413, f"the body is longer than {self._max} bytes (max_body_bytes)")

    def _counted(self, receive: Receive) -> Receive:
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._max:
                raise HTTPException(413, self._too_long().message)  # the one kind that FastAPI passes on
            return message

        return counted
