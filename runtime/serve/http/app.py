"""The ASGI application over one or more models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from .errors import add_handlers
from .guards import Guard
from .routes import adapters, chat, completions, control, embeddings, generate, health, pages, responses, tokens
from .serving import Serving

_FAMILIES = (adapters, health, completions, chat, responses, generate, tokens, embeddings, control, pages)


def build_app(state: Serving) -> ASGIApp:
    """Return the application that serves these models; they start with it, and end with it."""
    settings = state.settings

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for llm in state.metrics:
            llm.engine.start()
        yield
        await asyncio.gather(*(llm.shutdown() for llm in state.metrics))

    app = FastAPI(
        title="Seamwise", version=version("seamwise"), lifespan=lifespan, docs_url=None, redoc_url=None,
        description="OpenAI's routes, with vLLM's options.",
    )  # fmt: skip
    app.state.serving = state
    for family in _FAMILIES:
        app.include_router(family.router)
    add_handlers(app)
    _describe(app)
    guarded: ASGIApp = Guard(app, settings.keys(), settings.max_body_bytes, state.refuse)
    if settings.cors_allow_origins:
        guarded = CORSMiddleware(
            guarded, allow_origins=list(settings.cors_allow_origins), allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
        )  # fmt: skip
    return guarded


def _describe(app: FastAPI) -> None:
    """Take 422 out of the description: a body that does not fit gets 400, as at OpenAI."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = described()
            for operations in schema["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
