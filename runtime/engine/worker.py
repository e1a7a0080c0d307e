"""Where steps run: one thread, in order, so that the host can plan the next one beside it.

A job is the whole of a step: read the tokens that are known by now, run the model, sample, write the sampled tokens
where the next step reads them. Torch and our kernels run without the interpreter's lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from seamwise.runtime.build.step import StepInput, StepOutput
from seamwise.runtime.runner.profile import span
from seamwise.runtime.sampling.report import Found, prompt_logprobs
from seamwise.runtime.sampling.sampler import Sampled, sample
from seamwise.runtime.scheduler.commit import Step

from .batch import Batch
from .pooled_states import Pooling


class Steps(Protocol):
    """What computes steps: a ModelRunner, or anything that stands for one."""

    def step(self, batch: StepInput) -> StepOutput: ...


class StagedSteps(Steps, Protocol):
    """What computes steps in stages: several may be begun before the first is finished, in the same order."""

    def begin(self, batch: StepInput) -> None: ...

    def finish(self) -> StepOutput: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a step gave: sampled rows, log probabilities of prompts by the step's sequence; began and ended, seconds.

    pooled  (Y, D) float64, of a model that pools: the states of the texts that ended, and nothing is sampled
    """

    sampled: Sampled
    prompts: list[tuple[int, int, list[Found]]]
    began: float
    ended: float
    pooled: np.ndarray | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """A step under way."""

    step: Step
    future: Future[Result]


class Worker:
    """Runs jobs one after the other, in a thread of its own or, not `threaded`, where they are submitted.

    stages  what begins steps at once and finishes them in the thread, where steps go through stages
    """

    def __init__(
        self, steps: Steps, *, threaded: bool, mode: str, pooling: Pooling | None = None,
        stages: StagedSteps | None = None,
    ) -> None:  # fmt: skip
        self.steps, self.pooling = steps, pooling
        self.stages = stages if threaded else None
        self._mode = mode
        self._pool = ThreadPoolExecutor(1, "seamwise-step") if threaded else None
        self._last: Future[Result] | None = None

    def submit(self, batch: Batch, history: np.ndarray) -> Future[Result]:
        """Run a step after those submitted before; one that comes after a failed one fails as well."""
        before = self._last
        if self.stages is not None:
            future = self._begun(self.stages, batch, history, before)
        elif self._pool is not None:
            future = self._pool.submit(self._spanned, batch, history, before)
        else:
            future = Future()
            try:
                future.set_result(self._spanned(batch, history, before))
            except Exception as error:
                future.set_exception(error)
        self._last = future
        return future

    def _begun(
        self, stages: StagedSteps, batch: Batch, history: np.ndarray, before: Future[Any] | None
    ) -> Future[Result]:  # fmt: skip
        """Begin a step at once, beside those under way: all its tokens are known, for none of theirs is in it."""
        assert self._pool is not None
        batch.fill_tokens(history)
        try:
            stages.begin(batch.inputs)
        except Exception as error:
            future: Future[Result] = Future()
            future.set_exception(error)
            return future
        return self._pool.submit(self._spanned, batch, history, before, stages.finish)

    def drain(self) -> None:
        """Wait until nothing runs; what failed does not matter any more."""
        if self._last is not None:
            self._last.exception()
            self._last = None

    def close(self) -> None:
        """End the thread, when what it runs has ended."""
        if self._pool is not None:
            self._pool.shutdown()

    def _spanned(self, *given: Any) -> Result:
        with span("step"):
            return self._run(*given)

    def _run(
        self, batch: Batch, history: np.ndarray, before: Future[Any] | None,
        finish: Callable[[], StepOutput] | None = None,
    ) -> Result:  # fmt: skip
        if before is not None and before.exception() is not None:
            if finish is not None:
                finish()  # what it gave is nobody's
            raise RuntimeError("the step before this one failed")
        began = time.perf_counter()
        if finish is None:
            batch.fill_tokens(history)
            output = self.steps.step(batch.inputs)
        else:
            output = finish()
        if self.pooling is not None:
            assert output.hidden_states is not None
            pooled = self.pooling.take(output.hidden_states, batch.step)
            none = Sampled(tokens=np.empty(0, dtype=np.int64), logprobs={}, failed={})
            return Result(sampled=none, prompts=[], began=began, ended=time.perf_counter(), pooled=pooled)
        # Kernels are launched on the thread's current GPU, which may be another.
        with torch.cuda.device_of(output.logits):
            sampled, prompts = self._sampled(output.logits, batch)
        history[batch.sampling.slots, batch.sampling.positions] = sampled.tokens
        return Result(sampled=sampled, prompts=prompts, began=began, ended=time.perf_counter())

    def _sampled(self, logits: Tensor, batch: Batch) -> tuple[Sampled, list[tuple[int, int, list[Found]]]]:
        """Choose tokens by the first rows, and say how likely prompts were by those behind."""
        at = len(batch.sampling.slots)
        sampled, prompts = sample(logits[:at], batch.sampling, self._mode), []
        for p in batch.prompts:
            rows = logits[at : at + len(p.following)]
            prompts.append((p.sequence, p.start, prompt_logprobs(rows, p.following, p.count, self._mode)))
            at += len(p.following)
        return sampled, prompts
