"""What routes share: the model, who may come in, and one request's work from prompts to deltas."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

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

_UNSEEN = 16  # tokens between deltas that no client sees: they come as often as metrics want them
Route = Callable[[str, Request, Any], str | None]


class Serving:
    """One server's state, kept by the application as app.state.serving.

    metrics  of each model, once, whatever number of names it has
    route  may say which served model a request is for: (the name it asks for, the request, its body) -> a name, or
           None: as asked
    """

    def __init__(self, models: dict[str, AsyncLLM], settings: ServeSettings, route: Route | None = None) -> None:
        self.models, self.settings, self.route = models, settings, route
        self.default = next(iter(models))
        names = {llm: name for name, llm in reversed(models.items())}  # a model's first name
        self.metrics = {llm: Metrics(llm.engine, name, settings.metric_aliases) for llm, name in names.items()}
        self.started_s = time.time()
        self.draining = False
        self.held: str | None = None  # why requests are not taken yet, though the engine is ready
        self.works: set[Work] = set()  # that are not closed
        self.adapters = ServedAdapters(settings.lora_modules)  # of the first model
        self._template = settings.own_template()

    @property
    def llm(self) -> AsyncLLM:
        """The model that is served, the first where there are several."""
        return self.models[self.default]

    @property
    def num_in_work(self) -> int:
        """Prompts of requests that are not closed."""
        return sum(len(work.streams) for work in self.works)

    def names_in_work(self, request_ids: Sequence[str] | None) -> list[str] | None:
        """Return the engine's ids of requests by the ids that their answers carry; None: of all."""
        if request_ids is None:
            return None
        return [stream.request_id for work in self.works if work.name in request_ids for stream in work.streams]

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
        metrics = self.metrics[llm]
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


def serving(request: Request) -> Serving:
    """Return the application's state."""
    found: Serving = request.app.state.serving
    return found


class Work:
    """One HTTP request: the model that it is for, and its generation, a stream for each prompt, until it is closed.

    body     what was asked, as its route has it
    name     of the request in answers and logs
    model    as the request names it, which may be an adapter
    prompts  the model's tokenizer and templates
    streams  what is generated, in the order of its prompts
    """

    def __init__(
        self, state: Serving, body: Any, request: Request, prefix: str, model: str, llm: AsyncLLM, prompts: Prompts
    ) -> None:
        self.state, self.body, self.model, self.llm, self.prompts = state, body, model, llm, prompts
        self._request = request
        self.name = f"{prefix}-{self._asked('request_id', request.state.request_id)}"
        self.streams: list[Stream] = []
        self._times: list[RequestTimes] = []
        self._changed = asyncio.Event()

    @classmethod
    async def of(cls, body: Any, request: Request, prefix: str = "") -> Work:
        """Return the work that a request is, its name with this prefix.

        Raises ApiError 404 for a model that is not served, EngineError while it is not loaded.
        """
        state = serving(request)
        model, llm = state.choose(body.model, request, body)
        return cls(state, body, request, prefix, model, llm, await state.prompts(llm))

    def _asked(self, name: str, otherwise: Any) -> Any:
        """Return a field of the body, where its route has it and the request says it."""
        value = getattr(self.body, name, None)
        return otherwise if value is None else value

    def several(self, field: str, given: Any) -> list[Any]:
        """Return the prompts of a field that holds one or more, text or ids. Raises ValueError for none or too many."""
        found = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
        most = self.state.settings.max_prompts
        if not 1 <= len(found) <= most:
            raise ValueError(f"{field}: got {len(found)} prompts, wanted 1 to {most} (max_prompts)")
        return found

    async def submit(
        self, prompts: Sequence[tuple[str | None, list[int]]], params: SamplingParams,
        pooling: PoolingParams | None = None,
    ) -> None:  # fmt: skip
        """Queue the prompts, (text, ids) each. Raises ValueError, ApiError and EngineError; nothing is queued then."""
        if params.structured_outputs is not None:  # here, so that a hostile grammar costs neither engine nor event loop
            await asyncio.to_thread(params.structured_outputs.check)
        for _, ids in prompts:
            if pooling is None:  # else the engine checks what it pools
                self.state.check(params, ids, self.llm)
        self.state.admit(self.llm, len(prompts))
        interval = _UNSEEN
        if self._asked("stream", False):
            interval = self._asked("stream_interval", self.state.settings.stream_interval)
        self.state.works.add(self)
        for text, ids in prompts:
            try:
                stream = self.llm.submit(
                    uuid.uuid4().hex,  # a client's own id may come twice
                    ids, params, prompt=text, priority=self._asked("priority", 0), stream_interval=interval,
                    lora_request=self.state.adapters.by_name.get(self.model), pooling=pooling,
                )  # fmt: skip
            except Exception:
                self.close()
                raise
            stream.changed = self._changed  # whichever of them has something new wakes the one reader
            self.streams.append(stream)
            self._times.append(self.state.metrics[self.llm].arrived(len(ids), params, stream.rank))

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yield (number of the prompt, what an output of it got) until all ended; closing it early ends them.

        Raises how the first of them ended that did not end well.
        """
        left = dict(enumerate(self.streams))
        try:
            while left:
                await self._changed.wait()
                self._changed.clear()
                for i, stream in [*left.items()]:
                    if got := stream.now():
                        self._note(i, got)
                        for delta in got:
                            yield i, delta
                        self._changed.set()  # its end may stand behind what it got
                    elif stream.finished:
                        del left[i]
        finally:
            self.close()

    def _note(self, i: int, got: list[Delta]) -> None:
        self.state.metrics[self.llm].got(self._times[i], got)
        for delta in got:
            if delta.finish_reason == "error":
                raise RequestFailed(str(delta.stop_reason))
            if delta.finish_reason == "abort":
                raise EngineError("the request was aborted: the engine was paused, or /abort_requests was called")

    async def whole(self) -> dict[tuple[int, int], Delta]:
        """Return what each output got in all, by the prompt's number and its own, when all have ended."""
        found: dict[tuple[int, int], Delta] = {}
        async for i, delta in self.deltas():
            key = i, delta.index
            found[key] = merged(found[key], delta) if key in found else delta
        return dict(sorted(found.items()))

    async def answered(
        self, whole: Callable[[], Coroutine[Any, Any, Response]], events: Callable[[], AsyncIterator[bytes]] | None
    ) -> Response:
        """Return the response: events, or one answer when all is done. The work ends with it, or with its client."""
        receive, settings = self._request.receive, self.state.settings
        try:
            if events is None or not self._asked("stream", False):
                return await while_connected(receive, whole())
            parts = events()
            first: bytes = await while_connected(receive, anext(parts))  # type: ignore[arg-type]
        except BaseException:
            self.close()
            raise
        return EventStream(first, parts, settings.write_timeout_s, self.close)

    def close(self) -> None:
        """End what still runs."""
        for stream in self.streams:
            self.llm.engine.drop(stream)
        self.streams = []
        self.state.works.discard(self)

    def usage(self) -> dict[str, Any]:
        """Return OpenAI's count of tokens until now."""
        prompt, produced = sum(t.prompt_tokens for t in self._times), sum(t.tokens for t in self._times)
        cached = sum(t.cached for t in self._times)
        return {
            "prompt_tokens": prompt, "completion_tokens": produced, "total_tokens": prompt + produced,
            "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip
