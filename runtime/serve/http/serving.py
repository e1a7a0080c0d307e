"""What routes share: the model, who may come in, and one request's work from prompts to deltas."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from fastapi import Request, Response

from seamwise.runtime.sampling.params import SamplingParams
from seamwise.runtime.sampling.pooling_params import PoolingParams
from seamwise.runtime.serve.async_llm import AsyncLLM
from seamwise.runtime.serve.process.messages import Delta
from seamwise.runtime.serve.process.streams import EngineError, RequestFailed, Stream, merged
from seamwise.runtime.serve.prompts import Prompts

from .errors import ApiError
from .metrics import Metrics, RequestTimes
from .served_adapters import ServedAdapters
from .settings import ServeSettings
from .sse import EventStream, while_connected

_UNSEEN = 16  # tokens between deltas that no client sees
Route = Callable[[str, Request, Any], str | None]


class Serving:
    """One server's state, kept by the application as app.state.serving.

    route  may say which served model a request is for: (the name it asks for, the request, its body) -> a name, or
           None: as asked
    """

    def __init__(self, models: dict[str, AsyncLLM], settings: ServeSettings, route: Route | None = None) -> None:
        self.models, self.settings, self.route = models, settings, route
        self.default = next(iter(models))
        self.metrics = {
            id(llm): Metrics(llm.engine, name, settings.metric_aliases) for name, llm in _first_names(models)
        }
        self.started_s = time.time()
        self.draining = False
        self.held: str | None = None  # why requests are not taken yet, though the engine is ready
        self.num_in_work = 0
        self.adapters = ServedAdapters(settings.lora_modules)  # of the first model
        self._names: dict[str, list[str]] = {}  # a request's id in answers -> its ids in the engine
        self._template = settings.own_template()

    @property
    def llm(self) -> AsyncLLM:
        """The model that is served, the first where there are several."""
        return self.models[self.default]

    def names_in_work(self, request_ids: Sequence[str] | None) -> list[str] | None:
        """Return the engine's ids of requests by the ids that their answers carry; None: of all."""
        return None if request_ids is None else [one for name in request_ids for one in self._names.get(name, ())]

    def remember(self, name: str, engine_id: str) -> None:
        """Note a request that is in work."""
        self._names.setdefault(name, []).append(engine_id)

    def forget(self, name: str, engine_id: str) -> None:
        """Note that a request is no longer in work."""
        held = [one for one in self._names.pop(name, []) if one != engine_id]
        if held:
            self._names[name] = held

    def refuse(self, path: str) -> ApiError | None:
        """Say why no request is taken now: the server is about to end."""
        reason = "the server is shutting down" if self.draining else self.held
        if reason and path not in ("/health", "/health/ready", "/metrics", "/load"):
            return ApiError(503, reason, retry_s=10)
        return None

    def choose(self, asked: str | None, request: Request, body: Any) -> tuple[str, AsyncLLM]:
        """Return the model that a request is for. Raises ApiError 404 for one that is not served."""
        name = asked or self.default
        if self.route is not None:
            name = self.route(name, request, body) or name
        if name in self.adapters.by_name:
            return name, self.llm
        if name not in self.models:
            there = ", ".join([*self.models, *self.adapters.by_name])
            raise ApiError(404, f"model {name!r} is not served; there are: {there}", "model")
        return name, self.models[name]

    async def prompts(self, llm: AsyncLLM) -> Prompts:
        """Return a model's tokenizer and templates. Raises EngineError while it is not loaded."""
        llm.engine.check()
        prompts = await llm.prompts()
        if self._template is not None:
            prompts.templates["default"] = self._template
        return prompts

    def admit(self, llm: AsyncLLM, count: int) -> None:
        """Raise ApiError when so many more requests are too many now."""
        metrics = self.metrics[id(llm)]
        if self.num_in_work + count > self.settings.max_concurrent_requests:
            metrics.reject("max_concurrent_requests")
            raise ApiError(
                429, f"{self.num_in_work} requests are in work (max_concurrent_requests="
                f"{self.settings.max_concurrent_requests}); try again later", retry_s=1,
            )  # fmt: skip
        waiting = llm.engine.stats.num_waiting
        if waiting > self.settings.max_num_queued_reqs:
            metrics.reject("max_num_queued_reqs")
            raise ApiError(503, f"{waiting} requests are waiting already; try again later", retry_s=2)

    def check(self, params: SamplingParams, ids: Sequence[int], llm: AsyncLLM) -> None:
        """Raise ValueError for what this server, or its model, does not serve."""
        info, most = llm.engine.info, self.settings.max_logprobs
        assert info is not None
        if params.n > self.settings.max_n:
            raise ValueError(f"n={params.n}: this server gives at most {self.settings.max_n} (max_n)")
        if (params.logprobs or 0) > most:
            raise ValueError(f"logprobs: got {params.logprobs}, this server gives at most {most} (max_logprobs)")
        if len(ids) >= info.max_model_len:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, max_model_len is {info.max_model_len} with the output included"
            )


def _first_names(models: dict[str, AsyncLLM]) -> list[tuple[str, AsyncLLM]]:
    """Return each model once, by its first name."""
    names = {id(llm): name for name, llm in reversed(models.items())}
    return [(name, models[name]) for name in names.values()]


def serving(request: Request) -> Serving:
    """Return the application's state."""
    found: Serving = request.app.state.serving
    return found


async def chosen(body: Any, request: Request) -> tuple[Serving, str, AsyncLLM, Prompts]:
    """Return the state, and the model that a request is for: as it names it, and its tokenizer and templates.

    Raises ApiError 404 for one that is not served, EngineError while it is not loaded.
    """
    state = serving(request)
    name, llm = state.choose(body.model, request, body)
    return state, name, llm, await state.prompts(llm)


def request_name(request: Request, asked: str | None, prefix: str) -> str:
    """Return the id that a request has in answers and logs."""
    return f"{prefix}-{asked or request.state.request_id}"


class Answer(Protocol):
    """Turns the deltas of a request's work into what its client reads."""

    async def whole(self, work: Work) -> Response:
        """Return the answer when all is done."""

    def events(self, work: Work) -> AsyncIterator[bytes]:
        """Yield it in parts."""


class Work:
    """The generation of one HTTP request: one stream for each prompt, in the engine until it is closed.

    name   of the request in answers; model: what it asks for, which may be an adapter
    """

    def __init__(self, state: Serving, llm: AsyncLLM, name: str, model: str) -> None:
        self._state, self._llm, self._name = state, llm, name
        self._adapter = state.adapters.by_name.get(model)
        self._metrics = state.metrics[id(llm)]
        self._streams: list[Stream] = []
        self._times: list[RequestTimes] = []

    async def submit(
        self, prompts: Sequence[tuple[str | None, list[int]]], params: SamplingParams, *, priority: int,
        stream_interval: int, pooling: PoolingParams | None = None,
    ) -> None:  # fmt: skip
        """Queue the prompts, (text, ids) each. Raises ValueError, ApiError and EngineError; nothing is queued then.

        stream_interval  0: the client waits for the end, and deltas come as often as metrics want them
        """
        if params.structured_outputs is not None:  # here, so that a hostile grammar costs neither engine nor event loop
            await asyncio.to_thread(params.structured_outputs.check)
        for _, ids in prompts:
            if pooling is None:  # else the engine checks what it pools
                self._state.check(params, ids, self._llm)
        self._state.admit(self._llm, len(prompts))
        for text, ids in prompts:
            name = uuid.uuid4().hex  # a client's own id may come twice
            try:
                stream = self._llm.submit(
                    name, ids, params, prompt=text, priority=priority, stream_interval=stream_interval or _UNSEEN,
                    lora_request=self._adapter, pooling=pooling,
                )  # fmt: skip
            except Exception:
                self.close()
                raise
            self._streams.append(stream)
            self._times.append(self._metrics.arrived(len(ids), params, stream.rank))
            self._state.remember(self._name, name)
            self._state.num_in_work += 1

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yield (number of the prompt, what an output of it got) until all ended; closing it early ends them."""
        try:
            if len(self._streams) == 1:
                while got := await self._take(0):
                    for delta in got:
                        yield 0, delta
                return
            waits = {asyncio.create_task(self._take(i)): i for i in range(len(self._streams))}
            try:
                while waits:
                    done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        i = waits.pop(task)
                        if got := task.result():
                            waits[asyncio.create_task(self._take(i))] = i
                        for delta in got:
                            yield i, delta
            finally:
                for task in waits:
                    task.cancel()
        finally:
            self.close()

    async def whole(self) -> dict[tuple[int, int], Delta]:
        """Return what each output got in all, by the prompt's number and its own, when all have ended."""
        found: dict[tuple[int, int], Delta] = {}
        async for i, delta in self.deltas():
            key = i, delta.index
            found[key] = merged(found[key], delta) if key in found else delta
        return dict(sorted(found.items()))

    async def _take(self, i: int) -> list[Delta]:
        got = await self._streams[i].take()
        self._metrics.got(self._times[i], got)
        for delta in got:
            if delta.finish_reason == "error":
                raise RequestFailed(str(delta.stop_reason))
            if delta.finish_reason == "abort":
                raise EngineError("the request was aborted: the engine was paused, or /abort_requests was called")
        return got

    async def answered(self, request: Request, answer: Answer, *, stream: bool | None) -> Response:
        """Return the response: events, or one answer when all is done. The work ends with it, or with its client."""
        if stream:
            return await EventStream.of(
                answer.events(self), request, self._state.settings.write_timeout_s, self.close
            )  # fmt: skip
        return await while_connected(request, answer.whole(self), self.close)

    def close(self) -> None:
        """End what still runs."""
        for stream in self._streams:
            self._llm.engine.drop(stream)
            self._state.forget(self._name, stream.request_id)
        self._state.num_in_work -= len(self._streams)
        self._streams = []

    def usage(self) -> dict[str, Any]:
        """Return OpenAI's count of tokens until now."""
        prompt, produced = sum(t.prompt_tokens for t in self._times), sum(t.tokens for t in self._times)
        cached = sum(t.cached for t in self._times)
        return {
            "prompt_tokens": prompt, "completion_tokens": produced, "total_tokens": prompt + produced,
            "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip
