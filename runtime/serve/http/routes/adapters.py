"""Adapters while the server runs: POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import Field

from seamwise.runtime.serve.http.errors import ApiError
from seamwise.runtime.serve.http.schema import Body
from seamwise.runtime.serve.http.serving import Serving, serving

from .describe import CONTROLS

router = APIRouter()


class LoadAdapter(Body):
    """lora_path: a directory on the server's disk; load_inplace: it may replace the adapter of this name."""

    lora_name: Annotated[str, Field(min_length=1)]
    lora_path: Annotated[str, Field(min_length=1)]
    load_inplace: bool = False


class UnloadAdapter(Body):
    lora_name: Annotated[str, Field(min_length=1)]


def _state(request: Request) -> Serving:
    state = serving(request)
    if not state.settings.enable_control:
        raise ApiError(
            404, "adapters are loaded and unloaded with enable_control only; lora_modules serves some always"
        )
    return state


@router.post("/v1/load_lora_adapter", responses=CONTROLS, response_class=Response)
async def load(body: LoadAdapter, request: Request) -> Response:
    """Read an adapter; requests call it by its name from then on. Those that run keep what they have."""
    state, name = _state(request), body.lora_name
    before = state.adapters.by_name.get(name)
    if name in state.models or (before is not None and not body.load_inplace):
        raise ValueError(f"lora_name={name!r} is served already; unload it first, or set load_inplace=true")
    adapter = state.adapters.numbered(name, body.lora_path)
    await state.llm.add_lora(adapter)
    state.adapters.by_name[name] = adapter
    return Response(f"Success: LoRA adapter '{name}' added successfully.", media_type="text/plain")


@router.post("/v1/unload_lora_adapter", responses=CONTROLS, response_class=Response)
async def unload(body: UnloadAdapter, request: Request) -> Response:
    """Forget an adapter; 409 while requests use it."""
    state, name = _state(request), body.lora_name
    adapter = state.adapters.by_name.get(name)
    if adapter is None:
        raise ApiError(404, f"adapter {name!r} is not served; there are: {', '.join(state.adapters.by_name) or 'none'}")
    await state.llm.remove_lora(adapter.lora_int_id)
    del state.adapters.by_name[name]
    return Response(f"Success: LoRA adapter '{name}' removed successfully.", media_type="text/plain")
