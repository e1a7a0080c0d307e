"""What LLM does with a model that pools, by vLLM's names: embed, encode, score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from seamwise.runtime.build.arguments import named_arguments
from seamwise.runtime.engine.lora_request import LoRARequest
from seamwise.runtime.engine.outputs import (
    EmbeddingOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
    ScoringOutput,
)
from seamwise.runtime.sampling.pooling_params import NO_SAMPLING, PoolingParams

from .prompt_batch import asked, run

if TYPE_CHECKING:
    from .llm import LLM

_INSTEAD = {"truncate_prompt_tokens": "cut the prompt's ids before", "prompt_token_ids": "give prompts"}


class Pools:
    """The part of LLM that gives vectors. Texts are taken as they are: a model's instructions are the caller's."""

    @named_arguments(**_INSTEAD)
    def embed(
        self, prompts: Any, *, pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        use_tqdm: bool = True, lora_request: LoRARequest | None = None,
    ) -> list[PoolingRequestOutput[EmbeddingOutput]]:  # fmt: skip
        """Return each text's vector, `outputs[i].outputs.embedding`; prompts are those of generate.

        Raises ValueError for a model that generates, and for a text or dimensions that cannot be served, naming its
        index, before anything is computed.
        """
        found = _pooled(self, prompts, pooling_params, use_tqdm, lora_request)
        return [_output(one, EmbeddingOutput(embedding=_vector(one).tolist())) for one in found]

    @named_arguments(**_INSTEAD)
    def encode(
        self, prompts: Any, pooling_params: PoolingParams | Sequence[PoolingParams] | None = None, *,
        use_tqdm: bool = True, lora_request: LoRARequest | None = None, pooling_task: str = "embed",
    ) -> list[PoolingRequestOutput[PoolingOutput]]:  # fmt: skip
        """Return each text's vector as an array, `outputs[i].outputs.data`; as embed otherwise."""
        if pooling_task != "embed":
            raise ValueError(f"pooling_task={pooling_task!r}: wanted 'embed', a vector for each text")
        found = _pooled(self, prompts, pooling_params, use_tqdm, lora_request)
        return [_output(one, PoolingOutput(data=_vector(one))) for one in found]

    @named_arguments(**_INSTEAD)
    def score(
        self, data_1: Any, data_2: Any, *, use_tqdm: bool = True, lora_request: LoRARequest | None = None,
    ) -> list[PoolingRequestOutput[ScoringOutput]]:  # fmt: skip
        """Return the cosine of each pair's vectors: one text with each of several, or as many with as many."""
        left, right = ([one] if isinstance(one, (str, Mapping)) else list(one) for one in (data_1, data_2))
        if len(left) not in (1, len(right)):
            raise ValueError(f"score: got {len(left)} and {len(right)} texts, wanted as many, or one and any number")
        found = _pooled(self, [*left, *right], PoolingParams(use_activation=True), use_tqdm, lora_request)
        firsts, seconds = found[: len(left)], found[len(left) :]
        if len(firsts) == 1:
            firsts = firsts * len(seconds)
        return [
            PoolingRequestOutput(
                request_id=b.request_id, prompt_token_ids=a.prompt_token_ids + b.prompt_token_ids,
                outputs=ScoringOutput(score=float(_vector(a).astype(np.float64) @ _vector(b))),
            )
            for a, b in zip(firsts, seconds, strict=True)
        ]  # fmt: skip


def _pooled(
    pools: Pools, prompts: Any, params: PoolingParams | Sequence[PoolingParams] | None, use_tqdm: bool,
    lora_request: LoRARequest | None,
) -> list[RequestOutput]:  # fmt: skip
    llm = cast("LLM", pools)
    batch = asked(
        llm.engine, llm._prompt, prompts, NO_SAMPLING, lora_request, pooling=params or PoolingParams()
    )  # fmt: skip
    found = run(llm.engine, llm._ids, batch, use_tqdm)
    for one in found:
        if one.vector is None:
            raise RuntimeError(one.outputs[0].stop_reason or f"request {one.request_id} was aborted")
    return found


def _vector(output: RequestOutput) -> np.ndarray:
    assert output.vector is not None
    return output.vector


def _output(one: RequestOutput, outputs: Any) -> Any:
    return PoolingRequestOutput(
        request_id=one.request_id, outputs=outputs, prompt_token_ids=one.prompt_token_ids,
        num_cached_tokens=one.metrics.num_cached_tokens,
    )  # fmt: skip
