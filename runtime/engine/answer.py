"""From committed tokens to outputs: text, stop strings, log probabilities. What fails here ends its request alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from seamwise.runtime.sampling.logprob import Logprob
from seamwise.runtime.sampling.params import SamplingParams
from seamwise.runtime.sampling.stop import Reason
from seamwise.runtime.text.detokenize import Detokenizer
from seamwise.runtime.text.tokenizer import Tokenizer

from .request import Completion, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What a committed step gave one completion: its token of that index, prompt log probabilities, or an end, with
    the pooled state of a model that pools."""

    request: Request
    completion: Completion
    index: int = -1
    token: int | None = None
    logprobs: dict[int, Logprob] | None = None
    reason: Reason | None = None
    prompt_start: int = 0
    prompt_logprobs: list[dict[int, Logprob]] | None = None
    pooled: np.ndarray | None = None


class Answers:
    """Turns events into text; an event given twice is taken once."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer

    def detokenizer(self, prompt_token_ids: list[int], params: SamplingParams) -> Detokenizer | None:
        """Return what makes text of a request's tokens; None where it wants none."""
        if not params.detokenize or self.tokenizer is None:
            return None
        return Detokenizer(
            self.tokenizer, prompt_token_ids, stop=params.stop_strings, skip_special_tokens=params.skip_special_tokens,
            include_stop=params.include_stop_str_in_output,
        )  # fmt: skip

    def take(self, event: Event) -> None:
        """Add an event to its completion, and end it where the token, its text or an exception does."""
        c = event.completion
        if c.reason is not None:
            return
        try:
            if event.prompt_logprobs is not None:
                self._take_prompt(event)
            elif event.token is not None and event.index == c.num_taken:
                self._take_token(event, event.token)
            elif event.token is None:
                if event.pooled is not None and event.request.finish is not None:
                    c.vector = event.request.finish(event.pooled)
                c.reason = event.reason
        except Exception as error:
            c.reason = "error", f"request {event.request.request_id}: {type(error).__name__}: {error}"

    def close(self, request: Request, c: Completion) -> None:
        """Give an aborted completion the text that was held back."""
        if c.detokenizer is not None:
            self._mend(request, c)
            c.torn = True
            c.detokenizer.finish(may_stop=False)
            c.text = c.detokenizer.text

    def _take_token(self, event: Event, token: int) -> None:
        c, params, reason = event.completion, event.request.params, event.reason
        if c.detokenizer is not None:
            self._mend(event.request, c)
            if event.logprobs is not None:
                _spell(event.logprobs, c.detokenizer)
            c.torn = True
            stop = _show(c.detokenizer, token, reason, params, event.index)
            text = c.detokenizer.text
            if stop is not None:
                reason = "stop", stop
        else:
            text = ""
        total, taken = c.cumulative_logprob, event.index + 1
        c.token_ids[event.index :] = [token]  # again the same when it is done again
        if event.logprobs is not None:
            c.logprobs[event.index :] = [event.logprobs]
            total = (total or 0.0) + event.logprobs[token].logprob
        c.text, c.cumulative_logprob, c.reason, c.num_taken, c.torn = text, total, reason, taken, False  # taken now

    def _take_prompt(self, event: Event) -> None:
        assert event.prompt_logprobs is not None
        found = event.completion.prompt_logprobs
        for place, one in enumerate(event.prompt_logprobs, event.prompt_start + 1):
            if place == len(found):  # a preempted prompt is computed again
                here = self.detokenizer(event.request.prompt_token_ids[:place], event.request.params)
                if here is not None:
                    _spell(one, here)
                found = [*found, one]
        event.completion.prompt_logprobs = found

    def _mend(self, request: Request, c: Completion) -> None:
        """Make the text anew where an interrupt came between a token and its text."""
        if not c.torn:
            return
        c.detokenizer = self.detokenizer(request.prompt_token_ids, request.params)
        assert c.detokenizer is not None
        for index, token in enumerate(c.token_ids[: c.num_taken]):
            _show(c.detokenizer, token, None, request.params, index)
        c.torn = False


def _spell(found: dict[int, Logprob], detokenizer: Detokenizer) -> None:
    """Write what each token would add to the text where the detokenizer stands."""
    for logprob, text in zip(found.values(), detokenizer.texts_of(found), strict=True):
        logprob.decoded_token = text


def _show(detokenizer: Detokenizer, token: int, reason: Reason | None, p: SamplingParams, index: int) -> str | None:
    """Give a token to the detokenizer; return the stop string found. The text of a token that stops is left out."""
    may_stop = index + 1 > p.min_tokens
    stop = None
    if reason is None or reason[0] != "stop" or p.include_stop_str_in_output:
        stop = detokenizer.add(token, may_stop=may_stop)
    if reason is not None and stop is None:
        stop = detokenizer.finish(may_stop=may_stop)
    return stop
