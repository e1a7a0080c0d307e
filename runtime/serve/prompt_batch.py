"""The prompts of one call as requests: checked before any is computed, then run to completion."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import index
from typing import Any

from seamwise.runtime.engine.lora_request import LoRARequest
from seamwise.runtime.engine.outputs import RequestOutput
from seamwise.runtime.sampling.params import RequestOutputKind, SamplingParams
from seamwise.runtime.sampling.pooling_params import PoolingParams

Prompt = str | Mapping[str, Any]
Queue = Callable[[str], None]  # queues a request by this name


def read_prompt(prompt: Any, encode: Callable[[str], list[int]]) -> tuple[str | None, list[int]]:
    """Return (text, ids) of a string, {"prompt": str}, {"prompt_token_ids": [int]} or a list of ids."""
    given = prompt.get("prompt_token_ids", prompt.get("prompt")) if isinstance(prompt, Mapping) else prompt
    if isinstance(given, str):
        return given, encode(given)
    try:
        return None, [index(token) for token in given]  # numpy's and torch's whole numbers too
    except TypeError:
        wanted = 'a string, {"prompt": str} or {"prompt_token_ids": [int, …]}'
        raise ValueError(f"got {reprlib.repr(prompt)}, wanted {wanted}") from None


def asked(
    engine: Any, read: Callable[[Prompt], tuple[str | None, list[int]]], prompts: Prompt | Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams], lora_request: LoRARequest | Sequence[LoRARequest | None] | None,
    *, pooling: PoolingParams | Sequence[PoolingParams] | None = None, priority: Sequence[int] | None = None,
) -> list[Queue]:  # fmt: skip
    """Return what queues each prompt; adapters have been read then.

    read  a prompt's (text, ids)
    Raises ValueError for one that cannot be served, naming its index.
    """
    many = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
    rows = zip(
        many, _one_for_each(params, SamplingParams, len(many), "sampling_params"),
        _one_for_each(pooling, PoolingParams, len(many), "pooling_params"),
        _one_for_each(0 if priority is None else priority, int, len(many), "priorities"), strict=True,
    )  # fmt: skip
    adapters = _one_for_each(lora_request, LoRARequest, len(many), "lora_requests")
    found: list[Queue] = []
    for i, (prompt, p, pooled, urgency) in enumerate(rows):
        try:
            text, ids = read(prompt)
            engine.check(ids, p, pooled)
        except ValueError as error:
            raise ValueError(f"prompt {i}: {error}" if len(many) > 1 else str(error)) from None
        adapter = adapters[i] and replace(adapters[i], load_inplace=False)  # it has been read when requests are added
        found.append(
            partial(
                engine.add_request, prompt_token_ids=ids, params=replace(p, output_kind=RequestOutputKind.FINAL_ONLY),
                prompt=text, priority=urgency, lora_request=adapter, pooling=pooled,
            )
        )  # fmt: skip
    for adapter in dict.fromkeys(a for a in adapters if a is not None):
        engine.add_lora(adapter)
    return found


def _one_for_each(given: Any, kind: type, count: int, name: str) -> list[Any]:
    if given is None or isinstance(given, kind):
        return [given] * count
    if len(given) != count:
        raise ValueError(f"got {len(given)} {name} for {count} prompts; wanted one, or one for each")
    return list(given)


def run(engine: Any, numbers: Iterator[int], batch: Sequence[Queue], use_tqdm: bool) -> list[RequestOutput]:
    """Run requests to completion; when interrupted, none of them stays in the engine."""
    from tqdm import tqdm

    requests = {f"llm-{next(numbers)}": one for one in batch}
    done: dict[str, RequestOutput] = {}
    try:
        for request_id, queue in requests.items():
            queue(request_id)
        with tqdm(total=len(requests), desc="generate", unit="prompt", disable=None if use_tqdm else True) as bar:
            while len(done) < len(requests):
                for output in engine.step():
                    if output.finished:
                        done[output.request_id] = output
                        bar.update()
    except BaseException:
        for request_id in requests:
            engine.abort_request(request_id)
        raise
    return [done[request_id] for request_id in requests]
