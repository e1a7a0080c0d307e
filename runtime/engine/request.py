"""A request in the engine: its sequences, and what of them has been turned into text and given out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from seamwise.runtime.sampling.logprob import Logprob
from seamwise.runtime.sampling.params import RequestOutputKind, SamplingParams
from seamwise.runtime.sampling.rows import RowOptions
from seamwise.runtime.sampling.stop import Reason
from seamwise.runtime.scheduler.sequence import Sequence
from seamwise.runtime.text.detokenize import Detokenizer

from .outputs import CompletionOutput, RequestMetrics, RequestOutput

if TYPE_CHECKING:
    from .adapters import Known


@dataclass(slots=True, kw_only=True, eq=False)
class Completion:
    """One of a request's outputs: the tokens of its sequence that have become text.

    num_taken  how many tokens are in token_ids and text; one more may be there whose text was interrupted
    torn       the detokenizer was interrupted: its text is made anew from token_ids
    vector     (dimensions,) float32 of a text that was pooled
    """

    sequence: Sequence
    options: RowOptions
    detokenizer: Detokenizer | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=lambda: [None])
    text: str = ""
    reason: Reason | None = None
    num_taken: int = 0
    vector: np.ndarray | None = None
    torn: bool = False


@dataclass(slots=True, kw_only=True)
class Given:
    """What has been given out: tokens and characters of each completion, and whether the end was."""

    tokens: tuple[int, ...]
    characters: tuple[int, ...]
    finished: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """A request: n completions of one prompt.

    adapter  that it is computed with, None: none
    finish   makes a pooled state the vector that is asked for; None: the request generates
    held     why its caller wants it not to be scheduled yet; waits: what else it waits for
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    metrics: RequestMetrics
    cache_salt: str = ""
    adapter: Known | None = None
    finish: Callable[[np.ndarray], np.ndarray] | None = None
    held: str | None = None
    waits: list[str] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    given: Given = field(init=False)

    def __post_init__(self) -> None:
        self.given = Given(tokens=(0,) * self.params.n, characters=(0,) * self.params.n)

    @property
    def finished(self) -> bool:
        for c in self.completions:  # noqa: SIM110 (all() takes 2.7 times as long, and each abort asks)
            if c.reason is None:
                return False
        return True

    def due(self) -> bool:
        """Return whether an output is to be given out now."""
        if self.finished or self.given.finished:
            return not self.given.finished
        if self.params.output_kind is RequestOutputKind.FINAL_ONLY:
            return False
        interval = self.params.stream_interval or 1
        return any(
            c.num_taken > given and (given == 0 or c.reason is not None or c.num_taken - given >= interval)
            for c, given in zip(self.completions, self.given.tokens, strict=True)
        )

    def output(self) -> RequestOutput:
        """Return what is to be given out."""
        finished, first = self.finished, self.completions[0]
        since = self.given if self.params.output_kind is RequestOutputKind.DELTA else None
        shown = self.params.prompt_logprobs is not None and (since is None or not any(since.tokens))
        return RequestOutput(
            request_id=self.request_id, prompt=self.prompt, prompt_token_ids=self.prompt_token_ids,
            outputs=[self._completion(index, c, since) for index, c in enumerate(self.completions)], finished=finished,
            metrics=self.metrics if finished else self.metrics.now(),
            prompt_logprobs=first.prompt_logprobs if shown else None, vector=first.vector,
        )  # fmt: skip

    def given_with(self, output: RequestOutput) -> Given:
        """Return what has been given out when this output, the newest one, was."""
        tokens = tuple([c.num_taken for c in self.completions])
        characters = tuple([len(c.text) for c in self.completions])
        return Given(tokens=tokens, characters=characters, finished=output.finished)

    def _completion(self, index: int, c: Completion, since: Given | None) -> CompletionOutput:
        """Return what a completion has by now, or what it has that had not been given out."""
        start, text = (0, 0) if since is None else (since.tokens[index], since.characters[index])
        finish_reason, stop_reason = c.reason or (None, None)
        return CompletionOutput(
            index=index, text=c.text[text:], token_ids=c.token_ids[start : c.num_taken],
            cumulative_logprob=c.cumulative_logprob,
            logprobs=c.logprobs[start : c.num_taken] if self.params.wants_logprobs else None,
            finish_reason=finish_reason, stop_reason=stop_reason,
        )  # fmt: skip
