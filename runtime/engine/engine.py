"""The engine: requests in, one step at a time, outputs out. It joins scheduler, runner and sampler."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from seamwise.runtime.kv.pool import BlockPool
from seamwise.runtime.runner.runner import ModelRunner
from seamwise.runtime.sampling.logprob import Logprob
from seamwise.runtime.sampling.params import SamplingParams
from seamwise.runtime.sampling.sampler import Sampled, sample
from seamwise.runtime.scheduler.scheduler import Scheduler, SchedulerConfig
from seamwise.runtime.scheduler.sequence import Sequence
from seamwise.runtime.text.detokenize import Detokenizer
from seamwise.runtime.text.tokenizer import Tokenizer

from .batch import build_batch
from .outputs import CompletionOutput, RequestMetrics, RequestOutput

_Reason = tuple[str, str | int | None]  # finish_reason, stop_reason


@dataclass(slots=True, kw_only=True, eq=False)
class _Request:
    """A request and its sequences, one for each of its n outputs."""

    output: RequestOutput
    sequences: list[Sequence] = field(default_factory=list)
    detokenizers: list[Detokenizer | None] = field(default_factory=list)


class Engine:
    """Runs requests to completion over one runner. A bad request raises where it is added and disturbs no other."""

    def __init__(
        self, runner: ModelRunner, tokenizer: Tokenizer | None, config: SchedulerConfig, *,
        enable_prefix_caching: bool = True, seed: int = 0,
    ) -> None:  # fmt: skip
        self.runner = runner
        self.tokenizer = tokenizer
        self.eos_ids = _eos_ids(runner, tokenizer)
        self.seed = seed
        pool = BlockPool(num_blocks=runner.num_blocks, block_size=runner.block_size, caching=enable_prefix_caching)
        self.scheduler = Scheduler(config=config, pool=pool)
        self._requests: dict[str, _Request] = {}
        self._of_sequence: dict[str, tuple[_Request, int]] = {}
        self._arrivals = 0

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    def reset_prefix_cache(self) -> None:
        """Forget what the KV cache holds. Raises RuntimeError while requests run, whose past is in it."""
        if self._requests:
            raise RuntimeError(f"{len(self._requests)} requests are running; finish or abort them first")
        self.scheduler.pool.forget_all()

    def check(self, prompt_token_ids: list[int], params: SamplingParams) -> int:
        """Return how many tokens a request may produce. Raises ValueError for one that cannot be served."""
        limit, vocab = self.runner.options.max_model_len, self.runner.config.vocab_size
        if not prompt_token_ids:
            raise ValueError("the prompt has no tokens; wanted at least one")
        if bad := [t for t in prompt_token_ids if not 0 <= t < vocab]:
            raise ValueError(f"the prompt has token id {bad[0]}, wanted 0 to {vocab - 1} (the vocabulary)")
        if len(prompt_token_ids) >= limit:
            raise ValueError(
                f"the prompt has {len(prompt_token_ids)} tokens, max_model_len is {limit} with the output included;"
                " shorten the prompt or raise max_model_len"
            )
        if bad := [t for t in (*params.biases, *params.stop_tokens) if t >= vocab]:
            raise ValueError(f"logit_bias or stop_token_ids has token id {bad[0]}, wanted 0 to {vocab - 1}")
        if params.detokenize and self.tokenizer is None:
            raise ValueError("detokenize=True needs a tokenizer; this model directory has none: pass detokenize=False")
        room = limit - len(prompt_token_ids)
        if params.min_tokens > room:
            raise ValueError(
                f"min_tokens={params.min_tokens}, but max_model_len={limit} leaves room for {room}; lower it"
            )
        return min(room, params.max_tokens) if params.max_tokens is not None else room

    def add_request(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, *, prompt: str | None = None
    ) -> None:
        """Queue a request. Raises ValueError when it cannot be served, or its id is in use; nothing is queued then."""
        if request_id in self._requests:
            raise ValueError(f"request id {request_id!r} is in use by an unfinished request")
        max_tokens = self.check(prompt_token_ids, params)
        metrics = RequestMetrics(arrival_time=time.perf_counter())
        output = RequestOutput(
            request_id=request_id, prompt=prompt, prompt_token_ids=list(prompt_token_ids), metrics=metrics
        )
        request = _Request(output=output)
        for index in range(params.n):
            sequence = self._sequence(request_id, index, prompt_token_ids, params, max_tokens)
            self.scheduler.add(sequence)  # raises for the first or for none: they are of one size
            request.sequences.append(sequence)
            request.detokenizers.append(self._detokenizer(prompt_token_ids, params))
            logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
            output.outputs.append(CompletionOutput(index=index, text="", token_ids=[], logprobs=logprobs))
            self._of_sequence[sequence.id] = (request, index)
        self._requests[request_id] = request

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """End a request now and release its memory; return what it produced, None when there is no such request."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        running = [i for i, completion in enumerate(request.output.outputs) if not completion.finished()]
        for index in running:
            if detokenizer := request.detokenizers[index]:
                detokenizer.finish(may_stop=False)
                request.output.outputs[index].text = detokenizer.text
            self._finish(request, index, "abort", None)
        self.scheduler.remove([request.sequences[i] for i in running])
        return request.output

    def step(self) -> list[RequestOutput]:
        """Compute one step; return the requests it gave tokens, finished ones marked.

        When the runner raises, no token is lost: the sequences start over from their known tokens at the next call.
        """
        plan = self.scheduler.schedule()
        if not plan:
            return []
        work = []
        for sequence_id, count in plan.items():
            request, index = self._of_sequence[sequence_id]
            work.append((request.sequences[index], count))
        try:
            batch, yielding = build_batch(work, self.runner.block_size)
            sampled = sample(self.runner.step(batch).logits, yielding)
        except BaseException:
            self.scheduler.restart([s for s, _ in work])
            raise
        for sequence, count in work:
            sequence.num_computed += count
        return self._take(yielding, sampled)

    def _take(self, yielding: list[Sequence], sampled: Sampled) -> list[RequestOutput]:
        """Append each sampled token to its request, and finish what it ends."""
        now = time.perf_counter()
        touched: dict[str, RequestOutput] = {}
        ended: list[Sequence] = []
        for sequence, token, logprobs in zip(yielding, sampled.tokens, sampled.logprobs, strict=True):
            request, index = self._of_sequence[sequence.id]
            output = request.output
            touched[output.request_id] = output
            completion = output.outputs[index]
            sequence.append(token)
            completion.token_ids.append(token)
            if output.metrics.first_token_time is None:
                output.metrics.first_token_time = now
                output.metrics.num_cached_tokens = sequence.num_cached
            if logprobs is not None:
                self._take_logprobs(completion, token, logprobs, request.detokenizers[index])
            reason = self._ended_by_token(sequence, token)
            if detokenizer := request.detokenizers[index]:
                if (stop := self._show(detokenizer, sequence, token, reason)) is not None:
                    reason = "stop", stop
                completion.text = detokenizer.text
            if reason is not None:
                ended.append(sequence)
                self._finish(request, index, *reason)
        if ended:
            self.scheduler.remove(ended)
        return list(touched.values())

    @staticmethod
    def _ended_by_token(sequence: Sequence, token: int) -> _Reason | None:
        """Return (finish_reason, stop_reason) when a token, or the number of them, ends the sequence."""
        produced = sequence.num_tokens - sequence.num_prompt
        if produced > sequence.params.min_tokens:  # before that the sampler cannot choose one that ends
            if token in sequence.stop_ids:
                return "stop", None
            if token in sequence.params.stop_tokens:
                return "stop", token
        return ("length", None) if produced >= sequence.max_tokens else None

    @staticmethod
    def _show(detokenizer: Detokenizer, sequence: Sequence, token: int, reason: _Reason | None) -> str | None:
        """Give a token to the detokenizer; return the stop string found. The text of a token that stops is left out."""
        p = sequence.params
        may_stop = sequence.num_tokens - sequence.num_prompt > p.min_tokens
        stop = None
        if reason is None or reason[0] != "stop" or p.include_stop_str_in_output:
            stop = detokenizer.add(token, may_stop=may_stop)
        if reason is not None and stop is None:
            stop = detokenizer.finish(may_stop=may_stop)
        return stop

    @staticmethod
    def _take_logprobs(
        completion: CompletionOutput, token: int, logprobs: dict[int, Logprob], detokenizer: Detokenizer | None
    ) -> None:
        assert completion.logprobs is not None
        completion.logprobs.append(logprobs)
        completion.cumulative_logprob = (completion.cumulative_logprob or 0.0) + logprobs[token].logprob
        if detokenizer is not None:
            for logprob, text in zip(logprobs.values(), detokenizer.texts_of(logprobs), strict=True):
                logprob.decoded_token = text

    def _finish(self, request: _Request, index: int, reason: str, stop_reason: str | int | None) -> None:
        """Mark one output finished, and its request when it was the last. The caller removes it from the scheduler."""
        completion, sequence = request.output.outputs[index], request.sequences[index]
        completion.finish_reason, completion.stop_reason = reason, stop_reason
        del self._of_sequence[sequence.id]
        request.output.metrics.num_preemptions += sequence.num_preemptions
        if all(c.finished() for c in request.output.outputs):
            request.output.finished = True
            request.output.metrics.finished_time = time.perf_counter()
            del self._requests[request.output.request_id]

    def _sequence(
        self, request_id: str, index: int, prompt: list[int], params: SamplingParams, max_tokens: int
    ) -> Sequence:
        tokens = np.empty(len(prompt) + max_tokens, dtype=np.int64)
        tokens[: len(prompt)] = prompt
        seed = params.seed if params.seed not in (None, -1) else (self.seed << 32) + self._arrivals
        assert seed is not None
        self._arrivals += 1
        return Sequence(
            id=f"{request_id}/{index}", tokens=tokens, num_tokens=len(prompt), num_prompt=len(prompt), params=params,
            max_tokens=max_tokens, arrival=self._arrivals, seed=seed + (index << 48),
            stop_ids=() if params.ignore_eos else self.eos_ids,
        )  # fmt: skip

    def _detokenizer(self, prompt_token_ids: list[int], params: SamplingParams) -> Detokenizer | None:
        if not params.detokenize or self.tokenizer is None:
            return None
        return Detokenizer(
            self.tokenizer, prompt_token_ids, stop=params.stop_strings, skip_special_tokens=params.skip_special_tokens,
            include_stop=params.include_stop_str_in_output,
        )  # fmt: skip


def _eos_ids(runner: ModelRunner, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Return the ids that end a sequence: the model's, and the one that its tokenizer names (fine-tunes rename it)."""
    named = [] if tokenizer is None or tokenizer.eos_id is None else [tokenizer.eos_id]
    return tuple(dict.fromkeys(i for i in (*runner.config.eos_ids, *named) if i < runner.config.vocab_size))
