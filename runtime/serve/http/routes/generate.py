"""POST /inference/v1/generate: token ids in, token ids out; what trains models needs no text between.

Source: https://docs.vllm.ai/en/latest/serving/openai_compatible_server
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from seamwise.runtime.sampling.logprob import Logprob
from seamwise.runtime.sampling.params import SamplingParams
from seamwise.runtime.serve.http.answers import as_number
from seamwise.runtime.serve.http.schema import Body, TokenId
from seamwise.runtime.serve.http.serving import Work
from seamwise.runtime.serve.http.sse import DONE, event, json_response
from seamwise.runtime.serve.process.messages import Delta

from .describe import GENERATES

router = APIRouter()


class GenerateRequest(Body):
    """token_ids: the prompt. sampling_params: SamplingParams' fields; without text, detokenize=false is the default."""

    model: str | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    token_ids: Annotated[list[TokenId], Field(min_length=1)]
    sampling_params: dict[str, Any] = {}  # noqa: RUF012  # pydantic copies it
    stream: bool | None = False
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0


@router.post("/inference/v1/generate", responses=GENERATES, response_class=Response)
async def generate(body: GenerateRequest, request: Request) -> Response:
    """Continue token ids; the answer holds the ids of n outputs, with their log probabilities when asked for."""
    work = await Work.of(body, request, "generate-tokens")
    work.prompts.check(body.token_ids)
    given = {"detokenize": False, **work.llm.default_sampling, **body.sampling_params}
    if taken := given.keys() & {"output_kind", "stream_interval", "logits_processors", "repetition_detection"}:
        raise ValueError(f"sampling_params: {min(taken)} is not taken here; leave it out")
    try:
        params = SamplingParams(**given)
    except TypeError as error:  # a name that is no field, or a value that cannot be compared
        raise ValueError(f"sampling_params: {error}") from None
    await work.submit([(None, body.token_ids)], params)
    return await work.answered(lambda: _whole(work), lambda: _events(work))


async def _events(work: Work) -> AsyncIterator[bytes]:
    async for _, delta in work.deltas():
        yield event(_body(work, [delta]))
    yield DONE


async def _whole(work: Work) -> Response:
    deltas = [*(await work.whole()).values()]
    return json_response(_body(work, deltas) | {"usage": work.usage()})


def _body(work: Work, deltas: Sequence[Delta]) -> dict[str, Any]:
    """Return deltas as ids, with log probabilities where they are asked for."""
    body: dict[str, Any] = {"request_id": work.name, "choices": [_choice(delta) for delta in deltas]}
    for prompt in [delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None][:1]:
        body["prompt_logprobs"] = [None if row is None else _row(row) for row in prompt]
    return body


def _choice(delta: Delta) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": delta.index, "token_ids": delta.token_ids, "finish_reason": delta.finish_reason,
        "stop_reason": delta.stop_reason, "logprobs": None,
    }  # fmt: skip
    if delta.text:
        choice["text"] = delta.text
    if delta.logprobs is not None:
        choice["logprobs"] = {"content": [{**row[0], "top_logprobs": row} for row in map(_row, delta.logprobs)]}
    return choice


def _row(row: dict[int, Logprob]) -> list[dict[str, Any]]:
    """Return the sampled token's log probability first, then the most likely ones'."""
    return [{"token_id": token, "logprob": as_number(its), "rank": its.rank} for token, its in row.items()]
