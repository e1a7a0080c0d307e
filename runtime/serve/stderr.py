"""What a server says on stderr never makes it wait: a reader that stops reading stops a thread of its own, no request.

A pipe holds 64 KiB. Once it is full, any write waits, be it of a log line, a warning or a traceback, and the event loop
with it; so all of sys.stderr stands behind the queue, which is bounded, and not logging alone. The engine processes
write to a pipe that the server itself reads.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import select
import sys
import threading
from collections.abc import Iterator

MOST_BYTES = 1 << 20  # that wait to be written
_END_S = 2.0  # so long the end waits for a reader
_GAP = b""  # where texts were dropped


class Behind(io.TextIOBase):
    """A text stream onto a file descriptor: a thread writes what is given, in its order.

    Beyond MOST_BYTES that wait, what is written is dropped until these are gone; then their number is said, once.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._room, self._dropped = descriptor, MOST_BYTES, 0
        self._lock = threading.RLock()  # a signal handler may write while its thread does
        self._waiting: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._pass_on, name="seamwise-stderr", daemon=True)
        self._thread.start()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        """Queue a text, or drop it; it is never waited for."""
        data = text.encode(errors="backslashreplace")
        with self._lock:
            if self._dropped or len(data) > self._room:
                if not self._dropped:
                    self._waiting.put(_GAP)
                self._dropped += 1
            elif data:
                self._room -= len(data)
                self._waiting.put(data)
        return len(text)

    def end(self, wait_s: float) -> None:
        """Write what waits, for so long at most."""
        self._waiting.put(None)
        self._thread.join(wait_s)

    def _pass_on(self) -> None:
        with contextlib.suppress(OSError):  # its reader has closed it: there is nobody to say anything to
            while (data := self._waiting.get()) is not None:
                with self._lock:
                    if data == _GAP:
                        data = f"{self._dropped} texts for stderr were dropped: nobody read it\n".encode()
                        self._dropped = 0
                    else:
                        self._room += len(data)
                while data:
                    select.select([], [self._descriptor], [])  # whoever made it may have said that it must not wait
                    data = data[os.write(self._descriptor, data) :]


@contextlib.contextmanager
def unhurried_stderr() -> Iterator[None]:
    """Let what is written to sys.stderr wait in a queue; at the end it is written, unless nobody reads."""
    before = sys.stderr
    try:
        descriptor = before.fileno()
    except (AttributeError, io.UnsupportedOperation):  # none, or one in memory, which takes everything
        yield
        return
    behind = Behind(descriptor)
    sys.stderr = behind
    try:
        yield
    finally:
        sys.stderr = before
        behind.end(_END_S)
