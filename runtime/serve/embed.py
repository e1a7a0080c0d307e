"""What LLM does with a model that pools, by vLLM's names: embed, encode, score."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

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

_INSTEAD = {"truncate_prompt_tokens": "cut the prompt's ids before", "prompt_token_ids": "give prompts"}


class Pools:
    """The part of LLM that gives vectors. Texts are taken as they are: a model's instructions are the caller's."""

    engine: Any
    _ids: Iterator[int]
    _prompt: Any

    @named_arguments(**_INSTEAD)
    def embed(
        self, prompts: Any, *, pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        use_tqdm: bool = True, lora_request: LoRARequest | None = None,
    ) -> list[PoolingRequestOutput[EmbeddingOutput]]:  # fmt: skip
        """Return each text's vector, `outputs[i].outputs.embedding`; prompts are those of generate.

        Raises ValueError for a model that generates, and for a text or dimensions that cannot be served, naming its
        index, before anything is computed.
        """
        found = self._pooled(prompts, pooling_params, use_tqdm, lora_request)
        return [replace(one, outputs=EmbeddingOutput(embedding=one.outputs.data.tolist())) for one in found]

    @named_arguments(**_INSTEAD)
    def encode(
        self, prompts: Any, pooling_params: PoolingParams | Sequence[PoolingParams] | None = None, *,
        use_tqdm: bool = True, lora_request: LoRARequest | None = None, pooling_task: str = "embed",
    ) -> list[PoolingRequestOutput[PoolingOutput]]:  # fmt: skip
        """Return each text's vector as an array, `outputs[i].outputs.data`; as embed otherwise."""
        if pooling_task != "embed":
            raise ValueError(f"pooling_task={pooling_task!r}: wanted 'embed', a vector for each text")
        return self._pooled(prompts, pooling_params, use_tqdm, lora_request)

    @named_arguments(**_INSTEAD)
    def score(
        self, data_1: Any, data_2: Any, *, use_tqdm: bool = True, lora_request: LoRARequest | None = None,
    ) -> list[PoolingRequestOutput[ScoringOutput]]:  # fmt: skip
        """Return the cosine of each pair's vectors: one text with each of several, or as many with as many."""
        left, right = ([one] if isinstance(one, (str, Mapping)) else list(one) for one in (data_1, data_2))
        if len(left) not in (1, len(right)):
            raise ValueError(f"score: got {len(left)} and {len(right)} texts, wanted as many, or one and any number")
        found = self._pooled([*left, *right], PoolingParams(use_activation=True), use_tqdm, lora_request)
        firsts, seconds = found[: len(left)], found[len(left) :]
        if len(firsts) == 1:
            firsts = firsts * len(seconds)
        return [
            PoolingRequestOutput(
                request_id=b.request_id, prompt_token_ids=a.prompt_token_ids + b.prompt_token_ids,
                outputs=ScoringOutput(score=float(a.outputs.data.astype(np.float64) @ b.outputs.data)),
            )
            for a, b in zip(firsts, seconds, strict=True)
        ]  # fmt: skip

    def _pooled(
        self, prompts: Any, params: PoolingParams | Sequence[PoolingParams] | None, use_tqdm: bool,
        lora_request: LoRARequest | None,
    ) -> list[Any]:  # fmt: skip
        batch = asked(self.engine, self._prompt, prompts, NO_SAMPLING, lora_request, pooling=params or PoolingParams())
        return [pooled(one) for one in run(self.engine, self._ids, batch, use_tqdm)]


def pooled(output: RequestOutput) -> PoolingRequestOutput[PoolingOutput]:
    """Return the vector of a text. Raises RuntimeError with what went wrong where there is none."""
    if output.vector is None:
        raise RuntimeError(output.outputs[0].stop_reason or f"request {output.request_id} was aborted")
    return PoolingRequestOutput(
        request_id=output.request_id, outputs=PoolingOutput(data=output.vector),
        prompt_token_ids=output.prompt_token_ids, num_cached_tokens=output.metrics.num_cached_tokens,
    )  # fmt: skip
