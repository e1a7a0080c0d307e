"""`AsyncLLM`: a model in a process of its own, for asyncio, with vLLM's names."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from seamwise.runtime.engine.lora_request import LoRARequest
from seamwise.runtime.engine.outputs import (
    CompletionOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RequestMetrics,
    RequestOutput,
)
from seamwise.runtime.sampling.params import RequestOutputKind, SamplingParams
from seamwise.runtime.sampling.pooling_params import NO_SAMPLING, PoolingParams

from .embed import pooled
from .process.engines import Engines
from .process.messages import Add, Delta, Ready
from .process.streams import EngineError, Stream
from .prompts import Prompts

OWN_FACTORY = "seamwise.runtime.serve.llm:LLM"


class AsyncLLM:
    """Serves one model to many callers of one event loop. The model's process starts at the first call that needs it.

    model            as LLM's; **options are LLM's, as far as they are plain data
    step_timeout_s   longest step; a longer one is a hang: its requests get an error, and the engine starts again
    start_timeout_s  longest stage of start-up, and longest call that is no request: weights are read, say
    engine_factory   "module:function" that makes the LLM in its process; for engines other than LLM
    data_parallel_size  engines, each a process with all of the model and requests of its own

    Errors: ValueError for what the caller asked, EngineError (a RuntimeError) for an engine that cannot answer.
    """

    def __init__(
        self, model: str | Path, *, step_timeout_s: float = 60.0, start_timeout_s: float = 3600.0,
        engine_factory: str = OWN_FACTORY, data_parallel_size: int = 1, **options: Any,
    ) -> None:  # fmt: skip
        sent = {"model": str(model), "engine_factory": engine_factory, **plain(options)}
        self.engine = Engines(sent, data_parallel_size, (step_timeout_s, start_timeout_s))
        self._prompts: Prompts | None = None
        self._ids = itertools.count()

    @classmethod
    def from_engine_args(cls, engine_args: Mapping[str, Any], **more: Any) -> AsyncLLM:
        """Make one from a mapping of the constructor's arguments."""
        return cls(**{**engine_args, **more})

    @property
    def world_size(self) -> int:
        """Ranks that hold the model, or a part of it."""
        return self.engine.world_size

    @property
    def is_running(self) -> bool:
        return self.engine.state == "ready"

    @property
    def errored(self) -> bool:
        return self.engine.state in ("failed", "restarting")

    @property
    def dead_error(self) -> Exception:
        return EngineError(self.engine.reason)

    @property
    def default_sampling(self) -> dict[str, Any]:
        """What the model's maker recommends for sampling, where the request says nothing."""
        return dict(self.engine.info.default_sampling) if self.engine.info else {}

    async def ready(self) -> Ready:
        """Wait until the model is loaded. Raises RuntimeError with the cause when it cannot be."""
        return await self.engine.wait_ready()

    async def prompts(self) -> Prompts:
        """Return the model's tokenizer and templates, once it is loaded."""
        info = await self.ready()
        if self._prompts is None or self._prompts.info is not info:
            self._prompts = await asyncio.to_thread(Prompts, info)
        return self._prompts

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams | None = None, request_id: str | None = None, *,
        priority: int = 0, stream_interval: int = 1, lora_request: LoRARequest | None = None,
    ) -> AsyncIterator[RequestOutput]:  # fmt: skip
        """Yield one growing RequestOutput each time it grew, the last with finished=True.

        prompt  a string, {"prompt": str}, {"prompt_token_ids": [int, …]}
        Leaving the loop early aborts the request.
        """
        params = sampling_params or SamplingParams()
        if params.output_kind is not RequestOutputKind.CUMULATIVE:
            raise ValueError(f"output_kind={params.output_kind!r}: outputs grow here; leave it out")
        prompts = await self.prompts()
        text, ids = await asyncio.to_thread(prompts.of, prompt)
        name = request_id if request_id is not None else f"async-{next(self._ids)}"
        stream = self.submit(
            name, ids, params, prompt=text, priority=priority, stream_interval=stream_interval,
            lora_request=lora_request,
        )  # fmt: skip
        async with aclosing(self.outputs(stream, empty_output(name, ids, text, params.n))) as outputs:
            async for output in outputs:
                yield output

    async def outputs(self, stream: Stream, output: RequestOutput) -> AsyncGenerator[RequestOutput]:
        """Yield a request's output each time that it grew; closing this early aborts the request."""
        try:
            while deltas := await stream.take():
                for delta in deltas:
                    grow(output, delta)
                yield output
        finally:
            self.engine.drop(stream)

    def submit(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, *, prompt: str | None = None,
        priority: int = 0, stream_interval: int = 1, lora_request: LoRARequest | None = None,
        pooling: PoolingParams | None = None,
    ) -> Stream:  # fmt: skip
        """Queue a request of token ids and return its stream of deltas. Raises EngineError when the engine cannot."""
        sent = params_sent(params)
        return self.engine.add(
            Add(request_id, prompt_token_ids, sent, prompt, priority, stream_interval, lora_request, pooling)
        )

    async def encode(
        self, prompt: Any, pooling_params: PoolingParams | None = None, request_id: str | None = None, *,
        priority: int = 0, lora_request: LoRARequest | None = None,
    ) -> AsyncIterator[PoolingRequestOutput[PoolingOutput]]:  # fmt: skip
        """Yield one PoolingRequestOutput with the text's vector. Raises ValueError for a model that generates."""
        _, ids = await asyncio.to_thread((await self.prompts()).of, prompt)
        name = request_id if request_id is not None else f"async-{next(self._ids)}"
        pooling = pooling_params or PoolingParams()
        stream = self.submit(name, ids, NO_SAMPLING, priority=priority, lora_request=lora_request, pooling=pooling)
        async for output in self.outputs(stream, empty_output(name, ids)):
            yield pooled(output)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests; ids of none are no mistake."""
        self.engine.abort([request_id] if isinstance(request_id, str) else request_id)

    async def sleep(self, level: int = 1) -> None:
        """Give the weights' memory back (level 1: they can return; 2: they must be written anew)."""
        await self.engine.call("sleep", level)

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Undo sleep, of "weights", "kv_cache" or both."""
        await self.engine.call("wake_up", *([] if tags is None else [list(tags)]))

    async def is_sleeping(self) -> bool:
        return bool(await self.engine.call("is_sleeping"))

    async def pause_generation(self, *, mode: str = "abort", clear_cache: bool = True) -> None:
        """Stop between two steps; requests that arrive wait. mode: "abort", "wait" or "keep" what runs."""
        await self.engine.call("pause_generation", mode=mode, clear_cache=clear_cache)

    async def resume_generation(self) -> None:
        await self.engine.call("resume_generation")

    async def is_paused(self) -> bool:
        return bool(await self.engine.call("is_paused"))

    async def wait_for_requests_to_drain(self, drain_timeout: float = 300) -> None:
        """Wait until no request is unfinished. Raises TimeoutError."""
        async with asyncio.timeout(drain_timeout):
            while self.engine.num_requests:
                await asyncio.sleep(0.02)

    async def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Forget what the KV cache holds. Raises RuntimeError while requests run, unless they are to be aborted."""
        if reset_connector:
            raise ValueError("reset_connector: there is no KV connector; leave it out")
        if reset_running_requests:
            self.engine.abort()
        await self.engine.call("reset_prefix_cache")
        return True

    async def reset_mm_cache(self) -> None:
        """There are no images, and so nothing is kept of them."""

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """Read an adapter now. Raises ValueError for one that is refused."""
        return bool(await self.engine.call("add_lora", **asdict(lora_request)))

    async def remove_lora(self, lora_id: int) -> bool:
        return bool(await self.engine.call("remove_lora", lora_id))

    async def list_loras(self) -> set[int]:
        return set(await self.engine.call("list_loras"))

    async def collective_rpc(
        self, method: str, timeout: float | None = None, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:  # fmt: skip
        """Call a worker's method on every rank and return what each gave. Arguments and results are plain data."""
        async with asyncio.timeout(timeout):
            got = await self.engine.call("collective_rpc", method, args=list(args), kwargs=dict(kwargs or {}))
        return list(got)

    async def start_profile(self, profile_prefix: str | None = None) -> None:
        await self.engine.call("start_profile", profile_prefix)

    async def stop_profile(self) -> None:
        await self.engine.call("stop_profile")

    async def check_health(self) -> None:
        """Raise EngineError when the engine does not take requests."""
        self.engine.check()

    async def scale_elastic_ep(self, new_data_parallel_size: int, drain_timeout: float = 300) -> None:
        """Serve with another number of engines from now on; no request fails for it. Raises as Engines.scale does."""
        await self.engine.scale(new_data_parallel_size, drain_timeout)

    async def shutdown(self) -> None:
        """End the engine process; unfinished requests get an error."""
        await self.engine.stop()


def params_sent(params: SamplingParams) -> dict[str, Any]:
    """Return the fields that differ from SamplingParams' defaults; records in them are sent as their fields."""
    given = {f.name: value for f in fields(params) if (value := getattr(params, f.name)) != f.default}
    if given.pop("logits_processors", None):
        raise ValueError("logits_processors: functions are not sent to another process; use LLM")
    given.pop("output_kind", None)  # what is sent is always new; AsyncLLM's outputs grow
    return given


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as plain data. Raises ValueError for one that is none."""
    return {name: _plain(name, value) for name, value in options.items()}


def _plain(name: str, value: Any) -> Any:
    if type(value).__module__ == "torch":  # a dtype or device
        return str(value).removeprefix("torch.")
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(name, one) for one in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(name, one) for key, one in value.items()}
    raise ValueError(f"{name}={value!r}: another process cannot be given it; wanted plain data")


def empty_output(request_id: str, ids: list[int], prompt: str | None = None, n: int = 1) -> RequestOutput:
    """Return the output of a request that got nothing yet; see grow."""
    return RequestOutput(
        request_id=request_id, prompt=prompt, prompt_token_ids=ids,
        metrics=RequestMetrics(arrival_time=time.perf_counter()),
        outputs=[CompletionOutput(index=i, text="", token_ids=[]) for i in range(n)],
    )  # fmt: skip


def grow(output: RequestOutput, delta: Delta) -> None:
    """Add to an output what it got."""
    completion = output.outputs[delta.index]
    completion.text += delta.text
    completion.token_ids += delta.token_ids
    completion.finish_reason, completion.stop_reason = delta.finish_reason, delta.stop_reason
    if delta.logprobs is not None:
        completion.logprobs = (completion.logprobs or []) + delta.logprobs
        for token, row in zip(delta.token_ids, delta.logprobs, strict=True):
            completion.cumulative_logprob = (completion.cumulative_logprob or 0.0) + row[token].logprob
    if delta.prompt_logprobs is not None:
        output.prompt_logprobs = delta.prompt_logprobs
    if delta.vector is not None:
        output.vector = np.frombuffer(delta.vector, dtype="<f4")
    metrics, now = output.metrics, time.perf_counter()
    metrics.num_cached_tokens, metrics.num_preemptions = delta.num_cached_tokens, delta.num_preemptions
    metrics.first_token_time = metrics.first_token_time or now
    if delta.request_finished:
        output.finished, metrics.finished_time = True, now
