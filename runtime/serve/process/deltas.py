"""From the engine's outputs, which grow, to what each got since it was last sent."""

from __future__ import annotations

from dataclasses import dataclass

from seamwise.runtime.engine.outputs import CompletionOutput, RequestOutput
from seamwise.runtime.sampling.logprob import Logprob

from .messages import Delta, TokenLogprob


@dataclass(slots=True)
class _Sent:
    """How much of one output was sent: tokens, characters, log probabilities, and whether its end was."""

    tokens: int = 0
    characters: int = 0
    finished: bool = False


@dataclass(slots=True)
class _Followed:
    interval: int
    sent: list[_Sent]


class Deltas:
    """What was sent of every unfinished request."""

    def __init__(self) -> None:
        self._followed: dict[str, _Followed] = {}

    def follow(self, request_id: str, *, outputs: int, interval: int) -> None:
        """Start on a request with so many outputs; interval: tokens between two deltas, 0 for one at the end."""
        self._followed[request_id] = _Followed(interval, [_Sent() for _ in range(outputs)])

    def forget(self, request_id: str) -> None:
        self._followed.pop(request_id, None)

    @property
    def unfinished(self) -> list[str]:
        return list(self._followed)

    def of(self, output: RequestOutput) -> list[Delta]:
        """Return what is due of a request's outputs: the first token, each interval's, and every end."""
        followed = self._followed.get(output.request_id)
        if followed is None:
            return []
        found = []
        for completion, sent in zip(output.outputs, followed.sent, strict=True):
            if sent.finished:
                continue
            new, ended = len(completion.token_ids) - sent.tokens, completion.finish_reason is not None
            due = followed.interval and (sent.tokens == 0 or new >= followed.interval)
            if ended or (new and due):
                found.append(_delta(output, completion, sent))
        if output.finished:
            if found:
                found[-1].request_finished = True
            del self._followed[output.request_id]
        return found


def _delta(output: RequestOutput, completion: CompletionOutput, sent: _Sent) -> Delta:
    start = sent.tokens
    tokens = completion.token_ids[start:]
    logprobs = None
    if completion.logprobs is not None:
        rows = zip(tokens, completion.logprobs[start:], strict=True)
        logprobs = [_row(token, row) for token, row in rows]
    delta = Delta(
        request_id=output.request_id, index=completion.index, text=completion.text[sent.characters :], token_ids=tokens,
        logprobs=logprobs, finish_reason=completion.finish_reason, stop_reason=completion.stop_reason,
        num_cached_tokens=output.metrics.num_cached_tokens, num_preemptions=output.metrics.num_preemptions,
    )  # fmt: skip
    sent.tokens, sent.characters = len(completion.token_ids), len(completion.text)
    sent.finished = completion.finish_reason is not None
    return delta


def _row(token: int, row: dict[int, Logprob]) -> list[TokenLogprob]:
    """Return the sampled token's log probability first, then the others as they come."""
    ids = [token, *(one for one in row if one != token)]
    return [TokenLogprob(one, row[one].logprob, row[one].rank, row[one].decoded_token) for one in ids]
