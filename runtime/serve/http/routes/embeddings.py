"""POST /v1/embeddings: the vectors of texts, from a model that pools."""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from seamwise.runtime.sampling.pooling_params import NO_SAMPLING, PoolingParams
from seamwise.runtime.serve.http.schema import Labels, TokenId
from seamwise.runtime.serve.http.serving import Work
from seamwise.runtime.serve.http.sse import json_response

from .describe import GENERATES

router = APIRouter()


class EmbeddingRequest(Labels):
    """OpenAI's body of /v1/embeddings, with vLLM's use_activation: whether vectors are given length 1."""

    model: str | None = None
    input: str | list[str] | list[TokenId] | list[list[TokenId]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    use_activation: bool | None = None


@router.post("/v1/embeddings", responses=GENERATES, response_class=Response)
async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """Return one vector for each input; 400 for a model that generates and does not pool."""
    work = await Work.of(body, request, "embd")
    inputs = work.several("input", body.input)
    encoded = await asyncio.to_thread(lambda: [work.prompts.of(one) for one in inputs])
    for _, ids in encoded:
        work.prompts.check(ids)
    pooling = PoolingParams(dimensions=body.dimensions, use_activation=body.use_activation)
    await work.submit(encoded, NO_SAMPLING, pooling)
    return await work.answered(lambda: _answer(work, body), None)


async def _answer(work: Work, body: EmbeddingRequest) -> Response:
    as_text = body.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": i, "embedding": _encoded(delta.vector, as_text)}
        for (i, _), delta in (await work.whole()).items()
    ]
    usage = {name: n for name, n in work.usage().items() if name in ("prompt_tokens", "total_tokens")}
    return json_response({"object": "list", "data": data, "model": work.model, "usage": usage})


def _encoded(vector: bytes | None, as_text: bool) -> str | list[float]:
    assert vector is not None  # a text that failed has raised
    return base64.b64encode(vector).decode() if as_text else list(struct.unpack(f"<{len(vector) // 4}f", vector))
