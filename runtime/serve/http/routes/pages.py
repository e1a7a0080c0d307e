"""The status page at /, the playground beside it, and /status, which the first of them shows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response

from seamwise.runtime.serve.http.serving import serving
from seamwise.runtime.serve.http.sse import json_response

from .describe import READS

router = APIRouter()
_STATIC = Path(__file__).parent.parent / "static"
_FILES = {
    "/": ("index.html", "text/html"), "/playground": ("playground.html", "text/html"),
    "/static/page.css": ("page.css", "text/css"), "/static/page.js": ("page.js", "text/javascript"),
}  # fmt: skip
_POLICY = "default-src 'self'; img-src data:; frame-ancestors 'none'"
_LATENCIES = {
    "time to first token": "ttft", "between tokens": "itl", "whole request": "e2e", "queued": "queue",
    "prefill": "prefill", "decode": "decode",
}  # fmt: skip


def _page(path: str) -> Any:
    name, kind = _FILES[path]

    async def page() -> Response:
        headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
        return Response((_STATIC / name).read_bytes(), headers=headers, media_type=kind)

    return page


for _path in _FILES:
    router.add_api_route(_path, _page(_path), include_in_schema=False)


@router.get("/status", responses=READS, response_class=Response)
async def status(request: Request) -> Response:
    """What the status page shows: load, latencies, start-up, the compiler's report."""
    state = serving(request)
    engine, metrics = state.llm.engine, state.metrics[state.llm]
    values = metrics.values()
    queries = values["vllm:prefix_cache_queries_total"]
    told = {
        "models": list(state.models), "state": "draining" if state.draining else engine.state, "reason": engine.reason,
        "stage": engine.stage, "now_s": time.time(), "running": engine.stats.num_running,
        "waiting": engine.stats.num_waiting, "kv_cache_usage": engine.stats.kv_cache_usage,
        "restarts": engine.num_restarts, "generation_tokens": values["vllm:generation_tokens_total"],
        "prefix_hit_rate": values["vllm:prefix_cache_hits_total"] / queries if queries else 0.0,
        "latencies": [
            {"name": name, "count": count, "mean_ms": 1e3 * total / count if count else 0.0}
            for name, field in _LATENCIES.items()
            for count, total in [metrics.total_of(field)]
        ],
        "startup_s": engine.info.startup_s if engine.info else {},
        "explain": engine.info.explain if engine.info else {},
    }  # fmt: skip
    return json_response(told)
