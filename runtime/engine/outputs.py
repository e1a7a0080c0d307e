"""What a finished or running request gives back, with vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from seamwise.runtime.sampling.logprob import Logprob


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One output of a request: all until now, or what is new since the last one (SamplingParams.output_kind).

    text           without what may yet turn out to be a stop string, while it runs
    logprobs       one {token id: Logprob} a token, when asked for
    finish_reason  None while running, "stop", "length", "repetition", "abort", or "error"
    stop_reason    the stop string or token id that ended it, None for EOS; with "error", what went wrong
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True, kw_only=True)
class RequestMetrics:
    """Seconds on time.perf_counter's clock, None before they happen; prompt tokens served from the prefix cache."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0

    def now(self) -> RequestMetrics:
        """Return what is known by now, a copy (copy.copy takes five times as long)."""
        return RequestMetrics(
            arrival_time=self.arrival_time, first_scheduled_time=self.first_scheduled_time,
            first_token_time=self.first_token_time, finished_time=self.finished_time,
            num_cached_tokens=self.num_cached_tokens, num_preemptions=self.num_preemptions,
        )  # fmt: skip


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """One prompt with its outputs, in the order asked for; never changed once it was given out.

    prompt_logprobs  when asked for: None for the first token, then one {token id: Logprob} a token, in the output
                     that comes with the first sampled token and, where outputs hold all, in every later one
    vector           (dimensions,) float32, of a model that pools
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    vector: np.ndarray | None = None


@dataclass(slots=True, kw_only=True)
class EmbeddingOutput:
    """A text's vector, as LLM.embed gives it."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass(slots=True, kw_only=True)
class PoolingOutput:
    """A text's vector, (dimensions,) float32, as encode gives it."""

    data: np.ndarray


@dataclass(slots=True, kw_only=True)
class ScoringOutput:
    """The cosine of two texts' vectors."""

    score: float


Pooled = TypeVar("Pooled", EmbeddingOutput, PoolingOutput, ScoringOutput)


@dataclass(slots=True, kw_only=True)
class PoolingRequestOutput(Generic[Pooled]):
    """One text with what it became; of a score, both texts' ids one after the other."""

    request_id: str
    outputs: Pooled
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True
