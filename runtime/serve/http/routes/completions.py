"""POST /v1/completions: continue text or token ids."""

from __future__ import annotations

import asyncio
from itertools import accumulate
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from seamwise.runtime.sampling.logprob import Logprob
from seamwise.runtime.serve.http.answers import Choices, as_number, spelled
from seamwise.runtime.serve.http.schema import Sampling, TokenId
from seamwise.runtime.serve.http.serving import Work
from seamwise.runtime.serve.process.messages import Delta
from seamwise.runtime.serve.prompts import Prompts

from .describe import GENERATES

router = APIRouter()


class CompletionRequest(Sampling):
    """OpenAI's body of /v1/completions, with vLLM's options."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = 16
    logprobs: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    echo: bool = False
    add_special_tokens: bool = True


@router.post("/v1/completions", responses=GENERATES, response_class=Response)
async def complete(body: CompletionRequest, request: Request) -> Response:
    """Continue each prompt, with n outputs each; one answer, or events with stream=true."""
    work = await Work.of(body, request, "cmpl")
    asked = work.several("prompt", body.prompt)
    if body.echo and body.logprobs is not None:
        raise ValueError("echo and logprobs: prompt tokens have no log probabilities here; leave one out")
    params = body.sampling(work.llm.default_sampling, max_tokens=body.max_tokens, logprobs=body.logprobs)
    encoded = await asyncio.to_thread(_encoded, work.prompts, asked, body)
    await work.submit(encoded, params)
    answer = _Answer(work, [text or "" for text, _ in encoded])
    return await work.answered(answer.whole, answer.events)


def _encoded(prompts: Prompts, asked: list[Any], body: CompletionRequest) -> list[tuple[str | None, list[int]]]:
    found: list[tuple[str | None, list[int]]] = []
    for prompt in asked:
        if isinstance(prompt, str):
            ids = prompts.encode(prompt, add_special_tokens=body.add_special_tokens)
            found.append((prompt, ids))
        else:
            prompts.check(prompt)
            text = prompts.decode(prompt, skip_special_tokens=False) if body.echo else None
            found.append((text, list(prompt)))
        if not found[-1][1]:
            raise ValueError("prompt: has no tokens; wanted at least one")
    return found


class _Answer(Choices):
    """texts: of the prompts, where they come again (echo)."""

    def __init__(self, work: Work, texts: list[str]) -> None:
        super().__init__(work)
        self._texts = texts
        self._offsets: dict[int, int] = {}

    def choice(self, prompt: int, delta: Delta) -> dict[str, Any]:
        index = prompt * self.body.n + delta.index
        first = index not in self._offsets
        text = self._texts[prompt] + delta.text if first and self.body.echo else delta.text
        start = self._offsets.get(index, len(self._texts[prompt]) if self.body.echo else 0)
        choice: dict[str, Any] = {
            "index": index, "text": text, "logprobs": None, "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }  # fmt: skip
        self._offsets[index] = start + len(delta.text)
        if delta.logprobs is not None:
            choice["logprobs"] = told = _logprobs(delta, delta.logprobs, start, self.body.logprobs or 0)
            self._offsets[index] = start + sum(map(len, told["tokens"]))  # text may be held back, tokens are not
        if self.body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice


def _logprobs(delta: Delta, rows: list[dict[int, Logprob]], offset: int, most: int) -> dict[str, Any]:
    """Return the completions API's parallel lists; of a token's text the offset follows."""
    own = [row[token] for token, row in zip(delta.token_ids, rows, strict=True)]
    tokens = [spelled(token, its) for token, its in zip(delta.token_ids, own, strict=True)]
    return {
        "tokens": tokens,
        "token_logprobs": [as_number(its) for its in own],
        "top_logprobs": [_by_spelling(row) if most else None for row in rows],
        "text_offset": [*accumulate(map(len, tokens), initial=offset)][:-1],
    }


def _by_spelling(row: dict[int, Logprob]) -> dict[str, float]:
    """Return log probabilities by tokens' texts; of a text that several have, parts of characters say, also by ids."""
    found: dict[str, float] = {}
    for token, its in row.items():
        text = spelled(token, its)
        found[f"token_id:{token}" if text in found else text] = as_number(its)
    return found
