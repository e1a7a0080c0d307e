"""What a request got and its reader has not taken yet: one merged delta for each output, however slow the reader."""

from __future__ import annotations

import asyncio

from msgspec.structs import replace

from .messages import Delta


class EngineError(RuntimeError):
    """The engine cannot answer now: it ended, hangs, or is not ready. The message says why."""


class RequestRefused(ValueError):
    """The engine did not take the request: the message names what is wrong with it."""


class QueueFull(EngineError):
    """The engine's queue is full; the request may come again."""


class RequestFailed(RuntimeError):
    """The request ended with an error of its own; the engine and other requests go on. The message says which."""


class CallFailed(RuntimeError):
    """A method of the engine raised: its state does not allow the call, or something failed. The message says what."""


class Unsupported(NotImplementedError):
    """The engine has no such method."""


class Stream:
    """The deltas of one request, merged until they are taken: memory is bounded by what the request may produce.

    rank  of the engine that has it; aborted: somebody asked for its end
    """

    def __init__(self, request_id: str, rank: int = 0) -> None:
        self.request_id, self.rank = request_id, rank
        self.finished = self.aborted = False
        self._pending: dict[int, Delta] = {}
        self._error: Exception | None = None
        self.changed = asyncio.Event()  # set where something is new, or the request has ended

    def put(self, delta: Delta) -> None:
        """Add what the engine sent."""
        before = self._pending.get(delta.index)
        self._pending[delta.index] = delta if before is None else merged(before, delta)
        self.finished = self.finished or delta.request_finished
        self.changed.set()

    def fail(self, error: Exception) -> None:
        """End the stream with an error, after what it still holds."""
        self._error = error
        self.finished = True
        self.changed.set()

    async def take(self) -> list[Delta]:
        """Wait for something new and return it, each output at most once; nothing when all was taken.

        Raises EngineError or RequestRefused when that is how the request ended.
        """
        while not (taken := self.now()) and not self.finished:
            self.changed.clear()
            await self.changed.wait()
        return taken

    def now(self) -> list[Delta]:
        """Return what is new, each output at most once. Raises as take does, once all before that was taken."""
        if not self._pending and self._error is not None:
            raise self._error
        taken, self._pending = list(self._pending.values()), {}
        return taken


def merged(first: Delta, second: Delta) -> Delta:
    """Return one delta for two that follow each other."""
    logprobs = None
    if first.logprobs is not None and second.logprobs is not None:
        logprobs = first.logprobs + second.logprobs
    return replace(
        second, text=first.text + second.text, token_ids=first.token_ids + second.token_ids, logprobs=logprobs,
        prompt_logprobs=first.prompt_logprobs,
    )  # fmt: skip
