"""POST /v1/embeddings: the pooled hidden state of texts, where the model pools."""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from seamwise.runtime.serve.http.schema import Labels, TokenId
from seamwise.runtime.serve.http.serving import serving
from seamwise.runtime.serve.http.sse import encode_json
from seamwise.runtime.serve.process.streams import Unsupported

from .describe import GENERATES

router = APIRouter()


class EmbeddingRequest(Labels):
    """OpenAI's body of /v1/embeddings."""

    model: str | None = None
    input: str | list[str] | list[TokenId] | list[list[TokenId]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None


@router.post("/v1/embeddings", responses=GENERATES, response_class=Response)
async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """Return one vector for each input; 400 for a model that generates and does not pool."""
    state = serving(request)
    name, llm = state.choose(body.model, request, body)
    prompts = await state.prompts(llm)
    given: Any = body.input
    inputs = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    if not 1 <= len(inputs) <= state.settings.max_prompts:
        raise ValueError(f"input: got {len(inputs)}, wanted 1 to {state.settings.max_prompts} (max_prompts)")
    if body.dimensions is not None:
        raise ValueError(f"dimensions={body.dimensions}: vectors are given whole; leave it out")
    encoded = await asyncio.to_thread(lambda: [prompts.of(one)[1] for one in inputs])
    for ids in encoded:
        prompts.check(ids)
    try:
        vectors = [await llm.engine.call("embed", ids) for ids in encoded]
    except Unsupported:
        raise ValueError(f"model {name!r} generates text and has no embeddings; serve a model that pools") from None
    data = [
        {"object": "embedding", "index": i, "embedding": _base64(v) if body.encoding_format == "base64" else v}
        for i, v in enumerate(vectors)
    ]
    count = sum(map(len, encoded))
    answer = {
        "object": "list", "data": data, "model": name, "usage": {"prompt_tokens": count, "total_tokens": count},
    }  # fmt: skip
    return Response(encode_json(answer), media_type="application/json")


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
