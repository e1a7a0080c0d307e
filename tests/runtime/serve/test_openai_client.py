"""The real openai client, sync and async, against a running server on the demo model; offline ids are the reference."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from servers import get, post

from seamwise import LLM, SamplingParams

MESSAGES: list[Any] = [{"role": "user", "content": "Which city is the capital of France?"}]


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def offline(demo_model: Path) -> Iterator[LLM]:
    yield LLM(demo_model, max_model_len=1024, max_num_seqs=16)


def test_a_completion_equals_offline(client: openai.OpenAI, offline: LLM) -> None:
    prompts = ["The capital of France is", "1, 2, 3,"]
    got = client.completions.create(model="demo", prompt=prompts, max_tokens=8, temperature=0)
    want = offline.generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    assert [c.text for c in got.choices] == [o.outputs[0].text for o in want]
    assert got.usage is not None and got.usage.completion_tokens == 16
    assert got.usage.prompt_tokens == sum(len(o.prompt_token_ids) for o in want)


def test_an_answer_has_the_form_asked_for(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
    asked: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=48, temperature=0, response_format=asked
    )  # fmt: skip
    assert set(json.loads(answer.choices[0].message.content or "")) >= {"city"}
    stream = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=8, temperature=0, stream=True,
        extra_body={"structured_outputs": {"choice": ["Paris", "London"]}},
    )  # fmt: skip
    assert "".join(c.choices[0].delta.content or "" for c in stream) in ("Paris", "London")
    with pytest.raises(openai.BadRequestError, match="structured_outputs"):
        client.completions.create(model="demo", prompt="a", extra_body={"structured_outputs": {"regex": "(a"}})


def test_a_chat_equals_offline_whole_and_streamed(client: openai.OpenAI, offline: LLM) -> None:
    (want,) = offline.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
    whole = client.chat.completions.create(model="demo", messages=MESSAGES, max_completion_tokens=16, temperature=0)
    assert whole.choices[0].message.content == want.outputs[0].text
    assert whole.choices[0].finish_reason == want.outputs[0].finish_reason
    stream = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=16, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == want.outputs[0].text
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(want.outputs[0].token_ids)


def test_the_async_client_streams_many_at_once(server: str, offline: LLM) -> None:
    prompts = [f"Count: {i}," for i in range(12)]
    want = offline.generate(prompts, SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)

    async def one(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(model="demo", prompt=prompt, max_tokens=6, temperature=0, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def everything() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none") as client:
            return list(await asyncio.gather(*(one(client, prompt) for prompt in prompts)))

    assert asyncio.run(everything()) == [o.outputs[0].text for o in want]


def test_n_seed_stop_and_echo(client: openai.OpenAI) -> None:
    several = [client.completions.create(model="demo", prompt="Once", n=3, max_tokens=5, seed=7) for _ in range(2)]
    texts = [[c.text for c in one.choices] for one in several]
    assert texts[0] == texts[1] and len(set(texts[0])) > 1
    stopped = client.completions.create(model="demo", prompt="1, 2, 3,", max_tokens=20, temperature=0, stop=[" 6"])
    assert stopped.choices[0].finish_reason == "stop" and " 6" not in stopped.choices[0].text
    echoed = client.completions.create(model="demo", prompt="Hello", max_tokens=2, temperature=0, echo=True)
    assert echoed.choices[0].text.startswith("Hello") and len(echoed.choices[0].text) > 5


def test_logprobs_equal_offline(client: openai.OpenAI, offline: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=2)
    (want,) = offline.chat(MESSAGES, params, use_tqdm=False)
    rows = want.outputs[0].logprobs
    chat = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs
    assert content is not None and content.content is not None and rows is not None
    for got, row, token in zip(content.content, rows, want.outputs[0].token_ids, strict=True):
        assert got.logprob == pytest.approx(row[token].logprob, abs=2e-2) and got.token == row[token].decoded_token
        assert len(got.top_logprobs) == 2 and got.top_logprobs[0].logprob >= got.top_logprobs[1].logprob


def test_models_tokens_and_versions(client: openai.OpenAI, server: str, offline: LLM) -> None:
    assert [m.id for m in client.models.list()] == ["demo"] and client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match=r"'other' is not served; there are: demo"):
        client.completions.create(model="other", prompt="x")
    assert offline.tokenizer is not None
    ids = offline.tokenizer.encode("Hello there")
    assert post(f"{server}/tokenize", {"prompt": "Hello there"})[1]["tokens"] == ids
    assert post(f"{server}/detokenize", {"tokens": ids})[1] == {"prompt": "Hello there"}
    status, chat = post(f"{server}/tokenize", {"messages": MESSAGES})
    (want,) = offline.chat(MESSAGES, SamplingParams(max_tokens=1), use_tqdm=False)
    assert status == 200 and chat["tokens"] == want.prompt_token_ids
    rendered = post(f"{server}/v1/chat/completions/render", {"messages": MESSAGES})[1]
    assert rendered["prompt_token_ids"] == want.prompt_token_ids and "Which city is the capital" in rendered["prompt"]
    assert get(f"{server}/version")[1]["version"]
    assert get(f"{server}/load")[1]["num_steps"] > 0


def test_curl_as_in_the_quick_start_returns_seven_tokens(server: str) -> None:
    body = '{"model": "demo", "prompt": "San Francisco is a", "max_tokens": 7, "temperature": 0}'
    command = ["curl", "-s", f"{server}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert '"completion_tokens":7' in answer


def test_metrics_have_vllms_names_and_count(client: openai.OpenAI, server: str) -> None:
    def value(name: str) -> float:
        lines = [line for line in get(f"{server}/metrics")[1].splitlines() if line.startswith(name + "{")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total")
    before = [value(name) for name in names]
    client.completions.create(model="demo", prompt="The capital of France is", max_tokens=9, temperature=0)
    assert [value(name) - b for name, b in zip(names, before, strict=True)] == [5, 9, 1]
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"):
        assert f"vllm:{name}{{" in get(f"{server}/metrics")[1]
    assert value("seamwise:pass_matches") > 60 and value("vllm:time_to_first_token_seconds_count") > 0
