"""Run the application: listen, answer at once, say when the model is loaded, drain on SIGTERM, end with a status."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

import uvicorn

from seamwise.runtime.serve.async_llm import AsyncLLM
from seamwise.runtime.serve.process.child import Ended
from seamwise.runtime.serve.process.streams import EngineError

from .app import build_app
from .serving import Serving
from .settings import ServeSettings

CALLER, MACHINE = 2, 3
logger = logging.getLogger("seamwise.serve")


def listen(settings: ServeSettings) -> socket.socket:
    """Return a listening socket. Raises ValueError when the address is taken or not this machine's."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit it; else what is written next waits until the client says that it has what was written before,
    # which clients say up to 40 ms late.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        sock.bind((settings.host, settings.port))
        sock.listen(2048)
    except OSError as error:
        sock.close()
        raise ValueError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}; choose another --port (0: a"
            " free one) or --host"
        ) from error
    return sock


class Server(uvicorn.Server):
    """Drains before it ends: running requests finish within the deadline, new ones are refused.

    A second signal ends at once.
    """

    def __init__(self, config: uvicorn.Config, state: Serving) -> None:
        super().__init__(config)
        self._state = state
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        assert self._loop is not None
        if self._state.draining:
            self.should_exit = self.force_exit = True
            return
        self._state.draining = True
        logger.info("%s: waiting for %d requests", signal.Signals(sig).name, self._state.num_in_work)
        self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._drain()))

    async def _drain(self) -> None:
        deadline_s = time.monotonic() + self._state.settings.shutdown_timeout_s
        while self._state.num_in_work and time.monotonic() < deadline_s:
            await asyncio.sleep(0.05)
        for llm in self._state.models.values():
            await llm.shutdown()  # what still runs gets an error, not silence
        self.should_exit = True


def serve(
    state: Serving, ready: Callable[[str], None] = lambda address: None,
    check: Callable[[AsyncLLM], Awaitable[None]] | None = None,
) -> int:  # fmt: skip
    """Serve until a signal, and return the exit status. The first line on stderr says why, when that is not 0.

    ready  is called with the address once the models are loaded
    check  is awaited for each before requests are taken; a ValueError of it ends the server
    """
    state.held = None if check is None else "the model is being checked against its recipe"
    sock = listen(state.settings)
    config = uvicorn.Config(
        build_app(state), log_config=None, access_log=False, timeout_graceful_shutdown=5, lifespan="on",
        server_header=False, timeout_keep_alive=65, h11_max_incomplete_event_size=64 << 10,
    )  # fmt: skip
    server = Server(config, state)
    host, port = sock.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    return asyncio.run(_serve(server, sock, state, lambda: ready(address), check))


async def _serve(
    server: Server, sock: socket.socket, state: Serving, ready: Callable[[], None],
    check: Callable[[AsyncLLM], Awaitable[None]] | None,
) -> int:  # fmt: skip
    status = 0

    async def loaded() -> None:
        nonlocal status
        try:
            for llm in state.metrics:
                await llm.ready()
                await llm.prompts()
                if check is not None:
                    await check(llm)
            for adapter in state.adapters.by_name.values():
                await state.llm.add_lora(adapter)
            state.held = None
            ready()
            while not (failures := [llm.engine.failure for llm in state.metrics if llm.engine.failure is not None]):
                await asyncio.sleep(0.5)
            status = fail(failures[0])
        except EngineError as error:  # without a cause it was told to end while it loaded
            status = fail(error) if isinstance(error, Ended) else 0
        except ValueError as error:
            status = fail(Ended(str(error), "caller"))
        server.should_exit = True

    watching: asyncio.Task[Any] = asyncio.create_task(loaded())
    try:
        await server.serve([sock])
    finally:
        watching.cancel()
    return status


def fail(ended: Ended) -> int:
    """Say why the server ends, the cause first, and return the exit status."""
    print(f"seamwise serve: {ended}", file=sys.stderr)
    if ended.detail:
        print(ended.detail.rstrip(), file=sys.stderr)
    return CALLER if ended.kind == "caller" else MACHINE
