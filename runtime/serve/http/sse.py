"""Server-sent events to one client: a client that leaves, or takes nothing, ends the work for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ClientGone, as_api_error, error_body

DONE = b"data: [DONE]\n\n"
encode_json = msgspec.json.Encoder().encode
T = TypeVar("T")


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return an answer of JSON."""
    return Response(encode_json(value), status, headers, "application/json")


def event(data: Any, name: str | None = None) -> bytes:
    """Return one event with JSON data."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + encode_json(data) + b"\n\n"


class EventStream(Response):
    """Sends events until they end.

    first   is there before the status is sent, so that a refusal has its own
    events  those behind it; raises what as_api_error knows, and that becomes an event {"error": …}
    close   ends the work
    """

    media_type = "text/event-stream"

    def __init__(
        self, first: bytes, events: AsyncIterator[bytes], write_timeout_s: float, close: Callable[[], None]
    ) -> None:
        self.status_code = 200
        self.background = None
        self._events, self._first, self._timeout_s, self._close = events, first, write_timeout_s, close
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._write(send))
        except (ClientGone, OSError):
            pass  # nobody is there to be told
        finally:
            await self._events.aclose()  # type: ignore[attr-defined]
            self._close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await self._send(send, self._first)
        try:
            async for data in self._events:
                await self._send(send, data)
        except ClientGone:
            raise
        except Exception as error:
            told = as_api_error(error)
            await self._send(send, event(error_body(told)) + DONE)
        await self._send(send, b"", more=False)

    async def _send(self, send: Send, data: bytes, more: bool = True) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError:
            raise ClientGone from None


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` gives. Raises ClientGone, and cancels it, when the client leaves first."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
