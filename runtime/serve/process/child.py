"""One engine process: its start, what it says, whether it lives, and its end with the cause."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from .messages import Command, Event, Failed, Ready, Stage, decode_event, encode
from .streams import EngineError

_LOOK_S = 0.1  # how often the process is looked at
_STOPPED_S = 0.4  # so long stopped by a signal is taken for dead; a debugger's stop is another state
_LAST_WORDS_S = 2.0  # after its end, its own processes have so long to end and to let go of its output
_KEPT_LINES = 200
logger = logging.getLogger("seamwise.engine")


class Ended(EngineError):
    """Why an engine process ended. kind: "caller" where the same options would end it again, else "machine".

    told  the process said so itself
    """

    def __init__(self, message: str, kind: str = "machine", detail: str = "", *, told: bool = False) -> None:
        super().__init__(message)
        self.kind, self.detail, self.told = kind, detail, told


class Child:
    """A running engine process.

    handle          hears every event but the last
    step_timeout_s  longest step; start_timeout_s: longest stage of start-up, and longest call
    stage           of start-up, then "ready"; while a call is carried out, its name
    """

    def __init__(
        self, options: Mapping[str, Any], handle: Callable[[Event], None], step_timeout_s: float, start_timeout_s: float
    ) -> None:
        self.stage = "starting the process"
        self.ready = False
        self.pid = 0
        self._given_up = asyncio.Event()
        self._options, self._handle = options, handle
        self._step_timeout_s, self._start_timeout_s = step_timeout_s, start_timeout_s
        self._commands: zmq.Socket[bytes] | None = None
        self._unsent: deque[bytes] = deque()
        self._heard_s = time.monotonic()
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)

    def give_up(self) -> None:
        """End the process; run() returns as where it ended by itself."""
        self._given_up.set()

    def send(self, command: Command) -> None:
        """Send a command; it waits in memory until the process reads it, or ends."""
        if self._commands is not None:
            self._unsent.append(encode(command))
            self._flush()

    def _flush(self) -> None:
        """Send what waits. A send would block for ever where the process is gone and nobody has said so yet."""
        assert self._commands is not None
        with contextlib.suppress(zmq.Again):
            while self._unsent:
                self._commands.send(self._unsent[0], zmq.NOBLOCK)
                self._unsent.popleft()

    async def run(self) -> Ended:
        """Start the process, pass on what it says, and return why it ended; it is gone then, and at a cancellation."""
        with contextlib.ExitStack() as at_end:  # wherever this is cancelled: a context left behind stops a later thread
            home = tempfile.mkdtemp(prefix="seamwise-")  # readable by this user alone, as the sockets in it
            at_end.callback(shutil.rmtree, home, ignore_errors=True)
            context = zmq.asyncio.Context()
            at_end.callback(context.destroy, linger=0)
            commands: zmq.Socket[bytes] = zmq.Socket(context, zmq.PUSH)  # which does not wait, so no task's matter
            at_end.callback(commands.close, linger=0)
            commands.setsockopt(zmq.SNDHWM, 0)
            events = context.socket(zmq.PULL)
            addresses = [f"ipc://{Path(home) / name}" for name in ("commands", "events")]
            commands.bind(addresses[0])
            events.bind(addresses[1])
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "seamwise.runtime.serve.process.main", *addresses,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            self.pid, self._commands = process.pid, commands
            return await self._until_it_ends(process, events)

    async def _until_it_ends(self, process: asyncio.subprocess.Process, events: zmq.asyncio.Socket) -> Ended:
        assert process.stdin is not None and process.stdout is not None
        tasks = [
            asyncio.create_task(work)
            for work in (self._listen(events), self._watch(process.pid), self._exited(process, events), self._left())
        ]
        reading = asyncio.create_task(self._read_lines(process.stdout))
        try:
            process.stdin.write(msgspec.json.encode(self._options) + b"\n")
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return next(iter(done)).result()
        finally:
            self._commands = None
            for task in tasks:
                task.cancel()
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await asyncio.gather(*tasks, return_exceptions=True)
            await _exit_of(process)
            await asyncio.wait([reading], timeout=_LAST_WORDS_S)
            with contextlib.suppress(ProcessLookupError):  # ranks that are stuck where they do not see its end
                os.killpg(process.pid, signal.SIGKILL)
            await reading
            await process.wait()

    async def _listen(self, events: zmq.asyncio.Socket) -> Ended:
        while True:
            event = decode_event(await events.recv())
            self._heard_s = time.monotonic()
            if isinstance(event, Failed):
                return Ended(event.message, event.kind, event.detail, told=True)
            if isinstance(event, Stage):
                self.stage = event.name
            elif self.ready or isinstance(event, Ready):
                self.stage = "ready"
            if isinstance(event, Ready):
                self.ready = True
                for line in self._lines:
                    logger.info("%s", line)
            self._handle(event)

    async def _left(self) -> Ended:
        await self._given_up.wait()
        return Ended("the engine process was ended with the others of its group", told=True)

    async def _exited(self, process: asyncio.subprocess.Process, events: zmq.asyncio.Socket) -> Ended:
        code = await _exit_of(process)
        await asyncio.sleep(0.2)  # what it said at its end may still be on its way to _listen
        doing = "while serving" if self.stage == "ready" else f"in {self.stage}"
        if code < 0:
            name = signal.Signals(-code).name
            hint = "; if nobody sent it, the system was out of memory: give the engine less" if code == -9 else ""
            return Ended(f"the engine process was killed by {name} {doing}{hint}", detail="\n".join(self._lines))
        return Ended(f"the engine process ended with status {code} {doing}", detail="\n".join(self._lines))

    async def _watch(self, pid: int) -> Ended:
        """Return when the process is stopped, or has said nothing for longer than it may."""
        stopped_s = 0.0
        looked = time.monotonic()
        while True:
            await asyncio.sleep(_LOOK_S)
            self._flush()
            now = time.monotonic()
            if now - looked > 1 + _LOOK_S:  # this process itself stood still: nothing can be said of the other
                self._heard_s, stopped_s = now, 0.0
            looked = now
            stopped_s = stopped_s + _LOOK_S if _state(pid) == "T" else 0.0
            if stopped_s >= _STOPPED_S:
                return Ended("the engine process was stopped by a signal (SIGSTOP)")
            silent_s = now - self._heard_s
            if self.stage == "ready" and silent_s > self._step_timeout_s:
                return Ended(f"a step did not end within {self._step_timeout_s:g} s (step_timeout_s): the engine hangs")
            if self.stage != "ready" and silent_s > self._start_timeout_s:
                return Ended(f"{self.stage} did not end within {self._start_timeout_s:g} s (start_timeout_s)")

    async def _read_lines(self, stream: asyncio.StreamReader) -> None:
        while True:
            try:
                raw = await stream.readline()
            except ValueError:  # a line longer than the reader's limit; the rest of it follows
                continue
            if not raw:
                return
            line = raw.decode(errors="replace").rstrip()
            self._lines.append(line)
            if self.ready:
                logger.info("%s", line)


async def _exit_of(process: asyncio.subprocess.Process) -> int:
    """Return the exit code. asyncio's own wait() goes on while any other process holds what this one wrote to."""
    while process.returncode is None:
        await asyncio.sleep(_LOOK_S / 2)
    return process.returncode


def _state(pid: int) -> str:
    """Return the kernel's letter for a process' state (T: stopped by a signal), "" when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
