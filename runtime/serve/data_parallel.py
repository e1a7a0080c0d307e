"""Engines in processes of their own, for a caller that waits: what `LLM(data_parallel_size=N)` drives.

It has the methods of an engine and of an executor that LLM calls. An event loop in a thread talks to the processes.
"""

from __future__ import annotations

import asyncio
import queue
import tempfile
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from seamwise.runtime.engine.admit import check_request
from seamwise.runtime.engine.lora_request import LoRARequest
from seamwise.runtime.engine.outputs import RequestOutput
from seamwise.runtime.runner.named_tensors import named_tensors
from seamwise.runtime.sampling.params import SamplingParams
from seamwise.runtime.sampling.pooling_params import PoolingParams

from .async_llm import AsyncLLM, empty_output
from .process.messages import Ready
from .process.streams import Stream


class DataParallel:
    """The engines of one model.

    Errors: ValueError for what the caller asked; RuntimeError, its cause first, for an engine that ended.
    """

    def __init__(self, model: str | Path, options: Mapping[str, Any], has_tokenizer: bool) -> None:
        self._has_tokenizer = has_tokenizer
        self._llm = AsyncLLM(model, **options)
        self._readers: dict[str, asyncio.Task[None]] = {}
        self._ended: queue.SimpleQueue[RequestOutput | Exception] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="seamwise-engines", daemon=True)
        self._thread.start()
        self.shutdown = weakref.finalize(self, _end, self._loop, self._thread, self._llm)
        self._info: Ready = self._wait(self._llm.ready())

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        if not self.shutdown.alive:
            work.close()
            raise RuntimeError("the engines were shut down")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def check(
        self, prompt_token_ids: list[int], params: SamplingParams, pooling: PoolingParams | None = None
    ) -> int:  # fmt: skip
        """Return how many tokens a request may produce. Raises ValueError for one that cannot be served."""
        if params.structured_outputs is not None:
            params.structured_outputs.check()
        return check_request(
            prompt_token_ids, params, limit=self._info.max_model_len, vocab=self._info.vocab_size,
            has_tokenizer=self._has_tokenizer, pools=pooling is not None,
        )  # fmt: skip

    def add_request(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, *, prompt: str | None = None,
        priority: int = 0, lora_request: LoRARequest | None = None, pooling: PoolingParams | None = None,
    ) -> None:  # fmt: skip
        """Queue a request at the engine with the shortest queue; step() returns its output when it has ended."""
        output = empty_output(request_id, prompt_token_ids, prompt, params.n)

        async def submit() -> None:
            stream = self._llm.submit(
                request_id, prompt_token_ids, params, prompt=prompt, priority=priority, stream_interval=0,
                lora_request=lora_request, pooling=pooling,
            )  # fmt: skip
            self._readers[request_id] = asyncio.create_task(self._read(stream, output))

        self._wait(submit())

    async def _read(self, stream: Stream, output: RequestOutput) -> None:
        try:
            async for _ in self._llm.outputs(stream, output):
                pass
            self._ended.put(output)
        except Exception as error:
            self._ended.put(error)
        finally:
            self._readers.pop(output.request_id, None)

    def step(self) -> list[RequestOutput]:
        """Wait for a request to end and return all that have. Raises what ended one without an output."""
        found = [self._ended.get()]
        while not self._ended.empty():
            found.append(self._ended.get())
        if errors := [one for one in found if isinstance(one, Exception)]:
            raise errors[0]
        return [one for one in found if isinstance(one, RequestOutput)]

    def abort_request(self, request_id: str) -> None:
        """End a request, and forget what ended before it and was not given out."""

        async def abort() -> None:
            if (reader := self._readers.pop(request_id, None)) is not None:
                reader.cancel()
                await asyncio.wait([reader])
            while not self._ended.empty():
                self._ended.get()

        self._wait(abort())

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Read an adapter now, in every engine. Raises ValueError for one that is refused."""
        return bool(self._wait(self._llm.add_lora(lora_request)))

    def reset_prefix_cache(self) -> None:
        """Forget what the KV caches hold. Raises RuntimeError while requests run."""
        self._wait(self._llm.reset_prefix_cache())

    def collective_rpc(
        self, method: str | Callable[..., Any], timeout: float | None = None, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:  # fmt: skip
        """Call a method of every rank's worker; return the results by rank. Raises ValueError for a function."""
        if not isinstance(method, str):
            raise ValueError(f"collective_rpc: {method!r} cannot be sent to another process; name a method of workers")
        if method in ("sleep", "wake", "start_weight_update", "finish_weight_update"):  # LLM's, which engines note
            return [self._wait(self._llm.engine.call({"wake": "wake_up"}.get(method, method), *args))]
        if method in ("start_profile", "stop_profile"):  # engines have the configuration
            return [self._wait(self._llm.engine.call(method, *args[1:]))]
        if method == "load_weights":
            self._load_weights(*args)
            return [None]
        return list(self._wait(self._llm.collective_rpc(method, timeout, args, kwargs)))

    def _load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Write weights to memory that all processes read, and let every engine take them from there."""
        from safetensors.torch import save_file

        memory = Path("/dev/shm")
        with tempfile.TemporaryDirectory(prefix="seamwise-", dir=memory if memory.is_dir() else None) as folder:
            held = {name: tensor.detach().cpu().contiguous() for name, tensor in named_tensors(weights).items()}
            save_file(held, Path(folder) / "model.safetensors")
            self._wait(self._llm.engine.call("update_weights_from_path", folder))

    def scale(self, count: int) -> None:
        """Serve with so many engines from now on; see Engines.scale."""
        self._wait(self._llm.scale_elastic_ep(count))


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread, llm: AsyncLLM) -> None:
    asyncio.run_coroutine_threadsafe(llm.shutdown(), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
    loop.close()
