"""Whether the server lives, is ready, and what it does: /health, /load, /version, /metrics, /v1/models."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request, Response

from seamwise.runtime.serve.http.errors import ApiError
from seamwise.runtime.serve.http.serving import serving
from seamwise.runtime.serve.http.sse import json_response

from .describe import READS, answers

router = APIRouter()
_TEXT = {"text/plain": {"schema": {"type": "string"}}}


def _unready(**told: Any) -> Response:
    return json_response(told, 503, {"Retry-After": "2"})


@router.get("/health", responses=answers(503), response_class=Response)
@router.get("/ping", responses=answers(503), response_class=Response, include_in_schema=False)
async def health(request: Request) -> Response:
    """200 when every engine makes progress: it finished a step, or was idle, within the deadline. Else 503."""
    state = serving(request)
    if state.draining:
        return _unready(status="draining", reason="the server is shutting down")
    for name, llm in state.models.items():
        if llm.engine.state != "ready":
            return _unready(status=llm.engine.state, model=name, reason=llm.engine.reason)
    return json_response({"status": "ok"})


@router.get("/health/ready", responses=answers(503), response_class=Response)
async def ready(request: Request) -> Response:
    """200 when requests are taken; before that 503, with the stage that loading is in and its seconds until now."""
    state = serving(request)
    if state.draining or state.held:
        return _unready(status="draining" if state.draining else "checking", stage=state.held)
    for name, llm in state.models.items():
        if llm.engine.state != "ready":
            seconds = round(time.monotonic() - llm.engine.started_s, 3)
            return _unready(status=llm.engine.state, model=name, stage=llm.engine.stage, seconds=seconds)
    return json_response({"status": "ready", "stage": "ready"})


@router.get("/load", responses=READS, response_class=Response)
async def load(request: Request) -> Response:
    """What is in work now."""
    state = serving(request)
    engines = [llm.engine.stats for llm in state.metrics]
    return json_response(
        {
            "server_load": state.num_in_work,
            "num_requests_running": sum(s.num_running for s in engines),
            "num_requests_waiting": sum(s.num_waiting for s in engines),
            "kv_cache_usage": max(s.kv_cache_usage for s in engines),
            "num_steps": sum(s.num_steps for s in engines),
        }
    )


@router.get("/version", responses=READS, response_class=Response)
async def library_version(request: Request) -> Response:
    """The library's version."""
    return json_response({"version": version("seamwise")})


@router.get("/metrics", responses=answers(401, content=_TEXT), response_class=Response)
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text form."""
    texts = [each.text() for each in serving(request).metrics.values()]
    return Response(b"".join(texts), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/models", responses=READS, response_class=Response)
async def models(request: Request) -> Response:
    """The names that requests may ask for."""
    state = serving(request)
    return json_response({"object": "list", "data": [_model(state, name) for name in _names(state)]})


@router.get("/v1/models/{name:path}", responses=answers(401, 404), response_class=Response)
async def model(name: str, request: Request) -> Response:
    """One of them."""
    state = serving(request)
    if name not in _names(state):
        raise ApiError(404, f"model {name!r} is not served; there are: {', '.join(_names(state))}", "model")
    return json_response(_model(state, name))


def _names(state: Any) -> list[str]:
    return [*state.models, *state.adapters.by_name]


def _model(state: Any, name: str) -> dict[str, Any]:
    adapter = state.adapters.by_name.get(name)
    info = (state.llm if adapter else state.models[name]).engine.info
    return {
        "id": name, "object": "model", "created": int(state.started_s), "owned_by": "seamwise",
        "root": adapter.lora_path if adapter else name, "parent": state.default if adapter else None,
        "max_model_len": info.max_model_len if info else None,
    }  # fmt: skip
