"""What a finished or running request gives back, with vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass, field

from seamwise.runtime.sampling.logprob import Logprob


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One output of a request.

    text           without what may yet turn out to be a stop string, while it runs
    logprobs       one {token id: Logprob} a token, when asked for
    finish_reason  None while running, "stop", "length" or "abort"
    stop_reason    the stop string or token id that ended it; None for EOS
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
    first_token_time: float | None = None
    finished_time: float | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """One prompt with its outputs, in the order asked for. It is one object from first token to last, and grows."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics
