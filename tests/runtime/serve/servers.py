"""Servers for tests: the real command in a process, and the application over a fake engine in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from seamwise.runtime.serve.async_llm import AsyncLLM
from seamwise.runtime.serve.http.app import build_app
from seamwise.runtime.serve.http.run import Server, listen
from seamwise.runtime.serve.http.serving import Route, Serving
from seamwise.runtime.serve.http.settings import ServeSettings

HERE = Path(__file__).parent


@dataclass
class Running:
    """A server that runs in this process: where it is, its state, its loop."""

    url: str
    state: Serving
    loop: asyncio.AbstractEventLoop

    def wait_ready(self, timeout_s: float = 60) -> None:
        wait_ready(self.url, timeout_s)


def fake_llm(**options: Any) -> AsyncLLM:
    """Return an AsyncLLM whose process runs fake_llm.py."""
    os.environ["PYTHONPATH"] = str(HERE)  # the engine process finds the fake there
    return AsyncLLM("fake", engine_factory="fake_llm:make", **({"step_timeout_s": 1.5} | options))


@contextlib.contextmanager
def run_app(models: dict[str, AsyncLLM], route: Route | None = None, **settings: Any) -> Iterator[Running]:
    """Serve models from a thread, ready when the block begins."""
    chosen = ServeSettings(**({"port": 0} | settings))
    state = Serving(models, chosen, route)
    sock = listen(chosen)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # a client that does not read is felt soon
    server = Server(
        uvicorn.Config(build_app(state), log_config=None, access_log=False, timeout_graceful_shutdown=2), state
    )
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server._serve([sock])

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    try:
        wait_ready(url)
        yield Running(url, state, loops[0])
    finally:
        server.should_exit = True
        thread.join(60)


@contextlib.contextmanager
def run_command(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run `seamwise serve` with these arguments on a free port; it is ready when the block begins."""
    command = [sys.executable, "-P", "-m", "seamwise.runtime.serve.cli", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines: list[str] = []
    address = ""
    while not address:
        line = process.stderr.readline()
        assert line, "".join(lines)
        lines.append(line)
        if " is ready at http" in line:
            address = line.rpartition(" ")[2].strip()
    threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True).start()
    try:
        yield address, process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_ready(url: str, timeout_s: float = 60) -> None:
    def ready() -> bool:
        with contextlib.suppress(OSError):
            return get(f"{url}/health/ready")[0] == 200
        return False

    until(ready, lambda: f"{url} is not ready", timeout_s)


def until(
    true: Callable[[], bool], why: Callable[[], object] = lambda: "it was never true", within_s: float = 60
) -> None:
    """Wait for what may take long on a busy machine; `why` says what was found instead."""
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, why()
        time.sleep(0.01)


def get(url: str, **headers: str) -> tuple[int, Any]:
    """Return (status, JSON or text)."""
    return _ask(urllib.request.Request(url, headers=headers))


def post(url: str, body: Any, **headers: str) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return _ask(urllib.request.Request(url, data, {"Content-Type": "application/json", **headers}))


def _ask(request: urllib.request.Request) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text
