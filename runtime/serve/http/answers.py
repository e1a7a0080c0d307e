"""An answer in OpenAI's choices, whole or as events, with the count of tokens where it is asked for."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import Response

from seamwise.runtime.sampling.logprob import Logprob
from seamwise.runtime.serve.process.messages import Delta

from .serving import Work
from .sse import DONE, event, json_response


def spelled(token: int, its: Logprob) -> str:
    """Return a token as OpenAI's objects have it: its text, or its id where there is no tokenizer."""
    return its.decoded_token if its.decoded_token is not None else f"token_id:{token}"


def as_number(its: Logprob) -> float:
    """Return a log probability as JSON has numbers: OpenAI's -9999.0 for what cannot come."""
    return max(its.logprob, -9999.0)


class Choices:
    """What /v1/completions and /v1/chat/completions have in common. whole_kind, event_kind: the objects' names."""

    whole_kind = event_kind = "text_completion"

    def __init__(self, work: Work) -> None:
        self.work, self.body = work, work.body
        self._head = {"id": work.name, "created": int(time.time()), "model": work.model}

    def choice(self, prompt: int, delta: Delta) -> dict[str, Any]:
        """Return what an output of a prompt (its number) got, as a choice."""
        raise NotImplementedError

    def parts(self, prompt: int, delta: Delta) -> Iterator[dict[str, Any]]:
        """Yield it as the choices of events."""
        yield self.choice(prompt, delta)

    async def whole(self) -> Response:
        """Return the answer when all is done."""
        choices = [self.choice(i, delta) for (i, _), delta in (await self.work.whole()).items()]
        return json_response(
            {**self._head, "object": self.whole_kind, "choices": choices, "usage": self.work.usage()}
        )  # fmt: skip

    async def events(self) -> AsyncIterator[bytes]:
        """Yield each delta as events."""
        options, head = self.body.stream_options, {**self._head, "object": self.event_kind}
        running = options is not None and options.continuous_usage_stats
        async for i, delta in self.work.deltas():
            usage = {"usage": self.work.usage()} if running else {}
            for choice in self.parts(i, delta):
                yield event({**head, "choices": [choice], **usage})
        if options is not None and options.include_usage:
            yield event({**head, "choices": [], "usage": self.work.usage()})
        yield DONE
