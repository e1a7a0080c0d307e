"""Several models behind one server, and a hook that chooses by what a request says."""

from __future__ import annotations

from typing import Any

from servers import fake_llm, get, post, run_app
from similar_route import SimilarRoute
from starlette.requests import Request


def test_a_hook_chooses_the_model() -> None:
    def route(asked: str, request: Request, body: Any) -> str | None:
        return "large" if request.headers.get("x-hard") else None

    models = {"small": fake_llm(), "large": fake_llm(max_num_seqs=2)}
    with run_app(models, route) as running:
        assert [m["id"] for m in get(f"{running.url}/v1/models")[1]["data"]] == ["small", "large"]
        url, body = f"{running.url}/v1/completions", {"prompt": "ab", "max_tokens": 3}
        assert post(url, body)[1]["model"] == "small"
        assert post(url, {**body, "model": "large"})[1]["model"] == "large"
        assert post(url, body, **{"X-Hard": "1"})[1]["model"] == "large"
        text = get(f"{running.url}/metrics")[1]
        assert 'vllm:request_success_total{engine="0",finished_reason="length",model_name="large"} 2.0' in text
        assert 'vllm:request_success_total{engine="0",finished_reason="length",model_name="small"} 1.0' in text


def test_a_route_by_meaning_sends_a_question_where_its_kind_goes() -> None:
    route = SimilarRoute(
        {
            "code": ["write a python function that sorts a list", "why does this program crash with a segfault"],
            "cook": ["a recipe for tomato soup with basil", "how long do I boil potatoes"],
        },
        threshold=0.15,
    )
    assert route.choose("Please write a function in python that reverses a list") == "code"
    assert route.choose("How long must I boil eggs for a soup?") == "cook"
    assert route.choose("Who wrote Hamlet") is None
    with run_app({"code": fake_llm(), "cook": fake_llm()}, route) as running:
        for question, model in (("a recipe for potato soup", "cook"), ("Who wrote Hamlet", "code")):
            body = {"model": "auto", "messages": [{"role": "user", "content": question}], "max_tokens": 2}
            assert post(f"{running.url}/v1/chat/completions", body)[1]["model"] == model
            body = {"model": "auto", "prompt": question, "max_tokens": 2}
            assert post(f"{running.url}/v1/completions", body)[1]["model"] == model
