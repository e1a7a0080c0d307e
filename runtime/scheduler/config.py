"""The scheduler's limits, and how a full queue refuses."""

from __future__ import annotations

from dataclasses import dataclass


class QueueFullError(RuntimeError):
    """The queue is as long as it may be; the request was not queued. Try again later (HTTP 503)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of a step and of the queue, with vLLM's names.

    max_num_batched_tokens        tokens a step computes at most
    max_num_seqs                  sequences that run at once
    long_prefill_token_threshold  tokens of one sequence that a step computes at most; 0: no limit of its own
    scheduler_reserve_full_isl    a sequence starts only when all known tokens of it, and of those that run, fit
    watermark                     share of the blocks that stays free when a sequence starts beside others
    max_num_queued_reqs, max_num_queued_tokens  sequences and prompt tokens that may wait; None: any number
    scheduling_policy             name of a policy: scheduler/policies
    async_scheduling              plan a step while the one before it runs
    pipeline_parallel_size        stages that a step goes through: as many are under way, each with its part of those
                                  that run; who waits for a token of an earlier one is in none
    """

    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    long_prefill_token_threshold: int = 0
    scheduler_reserve_full_isl: bool = True
    watermark: float = 0.0
    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None
    scheduling_policy: str = "fcfs"
    async_scheduling: bool = True
    pipeline_parallel_size: int = 1

    @property
    def longest_chunk(self) -> int:
        """Tokens of one sequence that a step computes at most."""
        return min(self.max_num_batched_tokens, self.long_prefill_token_threshold or self.max_num_batched_tokens)

    def __post_init__(self) -> None:
        for name in ("max_num_batched_tokens", "max_num_seqs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: wanted at least 1")
        if self.long_prefill_token_threshold < 0:
            raise ValueError(
                f"long_prefill_token_threshold={self.long_prefill_token_threshold}: wanted tokens, or 0 for no limit"
            )
        if not 0 <= self.watermark < 1:
            raise ValueError(f"watermark={self.watermark}: wanted a share of the blocks, 0 or more and below 1")
        for name in ("max_num_queued_reqs", "max_num_queued_tokens"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise ValueError(f"{name}={limit}: wanted at least 1, or None for no limit")
