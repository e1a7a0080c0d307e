"""The engine: requests in, one step at a time, outputs out. It joins scheduler, runner and sampler.

    step:  plan and launch N+1, while N runs ─► wait for N ─► commit N ─► text and outputs of N

A request may wait for what is not the engine's: its grammar, its adapter, resume(). step() then waits with it, so that
`while engine.has_unfinished_requests(): engine.step()` is no busy loop, and wake() ends that from any thread.

State changes only inside `with self._change`. An exception in there, a Ctrl-C too, leaves the change marked as torn;
the next call then lets all that runs start over from its known tokens, none of which is lost.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from collections.abc import Sequence as Series
from dataclasses import replace
from functools import partial
from threading import Event as Flag
from typing import Any

from seamwise.runtime.build.pooler import Pooler
from seamwise.runtime.build.step import empty_step
from seamwise.runtime.kv.names import Namespace
from seamwise.runtime.kv.offload import Offload
from seamwise.runtime.kv.pool import BlockPool
from seamwise.runtime.runner.profile import span
from seamwise.runtime.runner.runner import ModelRunner
from seamwise.runtime.sampling.grammar import REASON, GrammarMask, Grammars
from seamwise.runtime.sampling.params import SamplingParams
from seamwise.runtime.sampling.pooling_params import PoolingParams, finish
from seamwise.runtime.sampling.report import check_mode
from seamwise.runtime.sampling.rows import MaskProvider
from seamwise.runtime.scheduler.config import SchedulerConfig
from seamwise.runtime.scheduler.policies import Policy
from seamwise.runtime.scheduler.scheduler import Recorder, Scheduler
from seamwise.runtime.scheduler.waiting_for_tiers import settle_loads
from seamwise.runtime.text.tokenizer import Tokenizer

from .adapters import REASON as ADAPTER
from .adapters import Adapters
from .admit import Intake
from .answer import Answers
from .control import Change, Control
from .drafting import Drafting
from .loop import Loop
from .lora_request import LoRARequest
from .outbox import Due, Outbox
from .outputs import RequestMetrics, RequestOutput
from .pace import Pace
from .pooled_states import Pooling
from .request import Request
from .worker import Worker


class Engine(Control):
    """Runs requests to completion over one runner. A bad request raises where it is added and disturbs no other.

    namespace  what prefix blocks' names begin with
    drafting   guesses of the next tokens, and how many of them stood
    pooler     of a model that pools: requests are texts, and their outputs vectors
    offload    where blocks go that leave the KV cache
    together   other ranks take each step with this one, and wait for it
    alike      other processes decide the same, each for itself: nothing may depend on the time that anything takes
    """

    def __init__(
        self, runner: ModelRunner, tokenizer: Tokenizer | None, config: SchedulerConfig, *,
        enable_prefix_caching: bool = True, seed: int = 0, logprobs_mode: str = "raw_logprobs",
        policy: Policy | None = None, recorder: Recorder | None = None, drafting: Drafting | None = None,
        adapters: Adapters | None = None, pooler: Pooler | None = None, offload: Offload | None = None,
    ) -> None:  # fmt: skip
        self.runner, self.offload = runner, offload
        self.tokenizer = tokenizer
        self.namespace = Namespace()
        if offload is not None:
            if drafting is not None and drafting.names_ahead:
                raise ValueError(
                    "kv_offloading_size and kv_offloading_folder: what speculative_config's method keeps beside the KV"
                    " cache does not come back with blocks; leave one out"
                )
            self.namespace = Namespace(layout=offload.layout)
            offload.ready = self.wake
        pool = BlockPool(
            num_blocks=runner.num_blocks, block_size=runner.block_size, caching=enable_prefix_caching,
            groups=runner.kv_groups,
        )  # fmt: skip
        self.scheduler = Scheduler(
            config=config, pool=pool, longest=runner.options.max_model_len, policy=policy, recorder=recorder,
            offload=offload,
        )  # fmt: skip
        self.pooler, self._intake = pooler, Intake(runner, tokenizer, pooler, seed)
        pooling = None if pooler is None else Pooling(pooler.kind, self.scheduler.slots.num_slots, pooler.size)
        stages: Any = runner if config.pipeline_parallel_size > 1 else None
        self.drafting, self.adapters = drafting or Drafting(), adapters
        worker = Worker(
            self.drafting.watched(runner), threaded=config.async_scheduling, mode=check_mode(logprobs_mode),
            pooling=pooling, stages=stages,
        )  # fmt: skip
        self.drafting.vocab_size = runner.config.vocab_size
        depth = max(2, config.pipeline_parallel_size) if config.async_scheduling else 1
        self._loop = Loop(
            self.scheduler, worker, depth=depth, drafting=self.drafting, adapters=adapters is not None
        )  # fmt: skip
        self._answers = Answers(tokenizer)
        self.grammars = Grammars(tokenizer, runner.config.vocab_size, self.eos_ids, ready=self.wake)
        self._requests: dict[str, Request] = {}
        self._outbox = Outbox()
        self._change = Change()
        self._woken = Flag()
        if adapters is not None:
            adapters.ready = self.wake
        self.together = self.alike = False
        self.pace = Pace()
        self._name_weights()

    def has_unfinished_requests(self) -> bool:
        """Return whether a request has not ended, or its outputs have not been given out: call step() until then."""
        return bool(self._requests or self._outbox.due)

    def wake(self) -> None:
        """Let a step() that waits look again at what it waits for. The only method that any thread may call."""
        self._woken.set()

    def ends_with(self, ids: int | Series[int] | None) -> None:
        """Let these ids of the model, and the tokenizer's, end outputs of requests that are added from now on."""
        self._intake.ends_with([] if ids is None else [ids] if isinstance(ids, int) else ids)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end outputs."""
        return self._intake.eos_ids

    def check(
        self, prompt_token_ids: list[int], params: SamplingParams, pooling: PoolingParams | None = None
    ) -> int:  # fmt: skip
        """Return how many tokens a request may produce. Raises ValueError for one that cannot be served.

        A grammar is validated here, for as long as it takes; add_request leaves that to the thread that compiles it.
        """
        if params.structured_outputs is not None:
            params.structured_outputs.check()
        return self._intake.room(prompt_token_ids, params, pooling)

    def add_request(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, *, prompt: str | None = None,
        priority: int = 0, tenant: str = "", cache_salt: str | None = None, mask_providers: Series[MaskProvider] = (),
        blocked: str | None = None, lora_request: LoRARequest | None = None, pooling: PoolingParams | None = None,
    ) -> None:  # fmt: skip
        """Queue a request.

        priority, tenant  read by policies: lower numbers first; whom tokens are charged to
        cache_salt        its prefix is shared with requests of the same salt only
        mask_providers    one for each of the n outputs: which tokens each may continue with
        blocked           why it cannot be scheduled yet, until unblock(request_id)
        lora_request      the adapter it is computed with; it is read meanwhile, and a refusal ends the request
        pooling           of a model that pools: the vector that is wanted; params are pooling.NO_SAMPLING then
        Raises ValueError when it cannot be served or its id is in use, QueueFullError when the queue is full; nothing
        is queued then.
        """
        self._recover()
        if request_id in self._requests:
            raise ValueError(f"request id {request_id!r} is in use by an unfinished request")
        if type(priority) is not int:
            raise ValueError(f"priority={priority!r}: wanted a whole number; lower ones go first, 0 is the default")
        if mask_providers and len(mask_providers) != params.n:
            raise ValueError(f"got {len(mask_providers)} mask_providers, wanted one for each of n={params.n} outputs")
        max_tokens = self._intake.room(prompt_token_ids, params, pooling)
        self.scheduler.admissible(request_id, len(prompt_token_ids), params.n)
        pooled = None
        if self.pooler is not None and pooling is not None:
            pooled = partial(finish, pooler=self.pooler, params=pooling)
        adapter = None if lora_request is None else self._with_adapters().add(lora_request)
        waits, masks = [] if adapter is None else [ADAPTER], list[GrammarMask]()
        if params.structured_outputs is not None:
            if mask_providers or blocked:
                raise ValueError("structured_outputs bring their own mask_providers, and block the request themselves")
            masks = mask_providers = self.grammars.start(request_id, params.structured_outputs, params.n)
            waits.append(REASON)
        request = Request(
            request_id=request_id, prompt=prompt, prompt_token_ids=list(prompt_token_ids), params=params,
            metrics=RequestMetrics(arrival_time=time.perf_counter()), cache_salt=cache_salt or "", adapter=adapter,
            held=blocked, waits=waits, finish=pooled,
        )  # fmt: skip
        for index in range(params.n):
            provider = mask_providers[index] if mask_providers else None
            made = self._intake.completion(
                request, index, provider, self._answers.detokenizer(request.prompt_token_ids, params),
                root=self._root(request), max_tokens=max_tokens, predicted=self.scheduler.predict(max_tokens),
                names_ahead=self.drafting.names_ahead,
            )  # fmt: skip
            request.completions.append(made)
        with self._change:
            for c in request.completions:
                s = c.sequence
                s.priority, s.tenant = priority, self.scheduler.tenant(tenant)
                s.blocked = self._blocked(request)
                self._loop.owners[s.arrival] = request, c
                self.scheduler.add(s)
            self._requests[request_id] = request  # from here on it is in the engine
            if self.adapters is not None and adapter is not None:
                self.adapters.waiting.append(request_id)
            if masks:
                self.pace.add(request, masks)

    def abort_request(self, request_id: str, reason: str = "abort", message: str | None = None) -> RequestOutput | None:
        """End a request now and release its memory; return what it produced, None when there is no such request.

        reason, message  finish_reason and stop_reason: "error" and what went wrong for one that cannot go on
        """
        self._recover()
        request = self._requests.get(request_id)
        if request is None:
            return None
        with self._change:
            for c in request.completions:
                if c.reason is None:
                    self._answers.close(request, c)
                    c.reason = reason, message
                    self.scheduler.remove((c.sequence,))
            self._outbox.take_back(request)  # what nobody was handed yet comes with this one
            output = request.output()
            request.given.finished = True
            self._leave(request)
        return output

    def unblock(self, request_id: str, reason: str | None = None) -> None:
        """Let a request be scheduled that was added as blocked, or name another reason that it is blocked for now."""
        self._recover()
        if request_id not in self._requests:
            raise ValueError(f"there is no unfinished request {request_id!r}")
        with self._change:
            self._requests[request_id].held = reason
            self._apply_block(self._requests[request_id])

    def _blocked(self, request: Request) -> str | None:
        return request.held or next(iter(request.waits), None) or ("paused" if self._paused else None)

    def _apply_block(self, request: Request) -> None:
        for c in request.completions:
            if c.reason is None:
                self.scheduler.block(c.sequence, self._blocked(request))

    def step(self, wait_s: float = 0.01) -> list[RequestOutput]:
        """Compute one step; return the outputs that are due.

        wait_s  where no request can go on by itself (blocked for a reason of its own, or paused), wait for wake() or
                the end of a compilation, at most so long, and compute nothing
        When the runner raises, no token is lost: what was under way starts over from its known tokens at the next call.
        In a wave (`together`) a step is taken in any case, an empty one where nothing can be computed.
        """
        self._recover()
        self._name_weights()
        self.grammars.settle(self._grammar_ready, self._refused, wait=self.alike)
        if self.adapters is not None and self.adapters.waiting:
            self.adapters.settle(self._requests, self._adapter_ready, self._refused, self.drain)
        if not self.alike:
            self.pace.settle(self._requests, self.scheduler, self._wait_for)
        if self._paused != "keep" and self._requests:
            while self._loop.may_launch:
                with self._change, span("plan"):
                    launched = self._loop.launch()
                if not launched:
                    break
        if self._loop.flights:
            self._finish()
        elif self.together:
            self.runner.step(empty_step(len(self.runner.kv_groups)))
        elif self._requests and not self._outbox.due and (self._paused == "keep" or self.scheduler.stalled):
            self._woken.wait(wait_s)
            self._woken.clear()
        return self._outbox.hand_over()

    def _grammar_ready(self, request_id: str) -> None:
        if request_id in self._requests:  # else it was aborted meanwhile
            self._wait_for(self._requests[request_id], REASON, False)

    def _adapter_ready(self, request: Request) -> None:
        with self._change:
            for c in request.completions:
                c.sequence.rename(self._root(request))  # the adapter's content is known by now
        self._wait_for(request, ADAPTER, False)

    def _wait_for(self, request: Request, reason: str, waits: bool) -> None:
        """Let a request wait for one thing more, or no longer."""
        with self._change:
            request.waits = [*(one for one in request.waits if one != reason), *[reason] * waits]
            self._apply_block(request)

    def _refused(self, request_id: str, error: Exception) -> None:
        request = self._requests.get(request_id)
        if request is None:
            return
        before = request.given
        output = self.abort_request(request_id, "error", f"request {request_id}: {error}")
        assert output is not None
        self._outbox.due.append(Due(output=output, request=request, before=before, after=request.given))

    def drain(self) -> None:
        """Wait for what is under way and commit it; its outputs come with the next step(). Raises what it raised."""
        self._recover()
        while self._loop.flights:
            self._finish()
        if self.offload is not None:
            self.offload.finish()
            with self._change:
                settle_loads(self.scheduler)

    def close(self) -> None:
        """Wait for what is under way and end the threads. Requests that have not ended never will.

        What the KV cache holds is kept where a tier outlives the process.
        """
        self._loop.worker.drain()
        if self.offload is not None:
            self.offload.close(self.scheduler.pool)
        self._loop.worker.close()
        self.grammars.close()
        if self.adapters is not None:
            self.adapters.close()

    def _finish(self) -> None:
        """Wait for the earliest step, commit it, and make outputs of it."""
        result = self._loop.wait()
        if isinstance(result, Exception):
            with self._change:
                self._loop.undo()
            raise result
        with self._change, span("answer"):
            self._loop.commit(result)
            self.pace.note(result.ended - result.began)
            self._answer()

    def _answer(self) -> None:
        """Make text of what was committed, end what its text ends, and collect the outputs that are due."""
        now = time.perf_counter()
        touched: dict[str, Request] = {}
        while self._loop.events:
            event = self._loop.events[0]
            request, c = event.request, event.completion
            self._answers.take(event)
            self._loop.events.popleft()
            touched[request.request_id] = request
            if request.metrics.first_token_time is None and (c.num_taken or c.vector is not None):
                request.metrics.first_token_time = now
                request.metrics.num_cached_tokens = c.sequence.num_cached or 0
            if c.reason is not None and not c.sequence.done:
                self.scheduler.remove([c.sequence])
        self._give(touched.values(), now)

    def _give(self, requests: Iterable[Request], now: float) -> None:
        for request in requests:
            self._outbox.give(request, now)
            if request.given.finished:
                self._leave(request)

    def _leave(self, request: Request) -> None:
        self._requests.pop(request.request_id, None)
        for c in request.completions:
            self._loop.owners.pop(c.sequence.arrival, None)

    def _recover(self) -> None:
        """Begin anew from the known tokens when a change of state was interrupted."""
        if not self._change.torn:
            return
        self._outbox.settle()
        self._loop.rebuild((r, c) for r in self._requests.values() for c in r.completions)
        self._answer()
        self._give(list(self._requests.values()), time.perf_counter())
        self._change.torn = False

    def _root(self, request: Request) -> bytes:
        adapter = "" if request.adapter is None else request.adapter.digest
        return replace(self.namespace, cache_salt=request.cache_salt, adapter=adapter).root()
