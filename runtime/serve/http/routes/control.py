"""What changes the engine: pause and resume, sleep and wake, new weights, the prefix cache; what trainers call."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from seamwise.runtime.serve.async_llm import AsyncLLM
from seamwise.runtime.serve.http.errors import ApiError
from seamwise.runtime.serve.http.schema import Body
from seamwise.runtime.serve.http.serving import serving
from seamwise.runtime.serve.http.sse import json_response

from .describe import CONTROLS

router = APIRouter()
Tag = Literal["weights", "kv_cache"]


class AbortRequests(Body):
    """request_ids: none of them, or left out, means all."""

    request_ids: list[str] | None = None


class RemoteCall(Body):
    method: Annotated[str, Field(min_length=1)]
    args: list[Any] = []  # noqa: RUF012  # pydantic copies it
    kwargs: dict[str, Any] = {}  # noqa: RUF012
    timeout: Annotated[float, Field(gt=0)] | None = None


class FinishUpdate(Body):
    """weight_version: what the weights are called from now on."""

    weight_version: str | None = None


class Scale(Body):
    """new_data_parallel_size: engines from now on; drain_timeout: seconds that requests of the others may take."""

    new_data_parallel_size: Annotated[int, Field(ge=1, le=64)]
    drain_timeout: Annotated[int, Field(gt=0)] = 300


class UpdateWeights(Body):
    """path: a checkpoint on the server's disk, whose tensors replace the served ones."""

    path: str


def _llm(request: Request) -> AsyncLLM:
    state = serving(request)
    if not state.settings.enable_control:
        raise ApiError(404, "routes that change the engine are served with enable_control only")
    return state.llm


@router.post("/pause", responses=CONTROLS, response_class=Response)
async def pause(
    request: Request, mode: Literal["abort", "wait", "keep"] = "abort", clear_cache: bool = True
) -> Response:
    """Stop between two steps; requests that arrive wait. mode: abort, wait for, or keep what runs."""
    await _llm(request).pause_generation(mode=mode, clear_cache=clear_cache)
    return json_response({"status": "paused"})


@router.post("/resume", responses=CONTROLS, response_class=Response)
async def resume(request: Request) -> Response:
    """Go on after a pause."""
    await _llm(request).resume_generation()
    return json_response({"status": "resumed"})


@router.get("/is_paused", responses=CONTROLS, response_class=Response)
async def is_paused(request: Request) -> Response:
    return json_response({"is_paused": await _llm(request).is_paused()})


@router.post("/sleep", responses=CONTROLS, response_class=Response)
async def sleep(request: Request, level: Annotated[int, Query(ge=1, le=2)] = 1) -> Response:
    """Give the weights' memory back: they can return (1), or must be written anew (2)."""
    await _llm(request).sleep(level)
    return json_response({"status": "asleep"})


@router.post("/wake_up", responses=CONTROLS, response_class=Response)
async def wake_up(request: Request, tags: Annotated[list[Tag] | None, Query()] = None) -> Response:
    """Undo sleep, of everything or of what the tags name."""
    await _llm(request).wake_up(tags)
    return json_response({"status": "awake"})


@router.get("/is_sleeping", responses=CONTROLS, response_class=Response)
async def is_sleeping(request: Request) -> Response:
    return json_response({"is_sleeping": await _llm(request).is_sleeping()})


@router.post("/reset_prefix_cache", responses=CONTROLS, response_class=Response)
async def reset_prefix_cache(request: Request, reset_running_requests: bool = False) -> Response:
    """Forget what the KV cache holds; 409 while requests run, unless they are to be aborted."""
    await _llm(request).reset_prefix_cache(reset_running_requests)
    return json_response({"status": "reset"})


@router.post("/start_profile", responses=CONTROLS, response_class=Response)
async def start_profile(request: Request, profile_prefix: str | None = None) -> Response:
    """Record what the engine does, where the server has --profiler-config."""
    await _llm(request).start_profile(profile_prefix)
    return json_response({"status": "profiling"})


@router.post("/stop_profile", responses=CONTROLS, response_class=Response)
async def stop_profile(request: Request) -> Response:
    """End the profile and write it to torch_profiler_dir."""
    await _llm(request).stop_profile()
    return json_response({"status": "written"})


@router.post("/abort_requests", responses=CONTROLS, response_class=Response)
async def abort_requests(body: AbortRequests, request: Request) -> Response:
    """End requests by the ids that their answers carry; each gets an error."""
    state, llm = serving(request), _llm(request)
    llm.engine.abort(state.names_in_work(body.request_ids))
    return json_response({"status": "aborted"})


@router.post("/start_weight_update", responses=CONTROLS, response_class=Response)
async def start_weight_update(request: Request) -> Response:
    """Begin new weights: nothing is generated until they are whole."""
    return json_response({"result": await _llm(request).engine.call("start_weight_update")})


@router.post("/update_weights", responses=CONTROLS, response_class=Response)
async def update_weights(body: UpdateWeights, request: Request) -> Response:
    """Write the tensors of a checkpoint on the server's disk into the model, by their names."""
    return json_response({"result": await _llm(request).engine.call("update_weights_from_path", body.path)})


@router.post("/finish_weight_update", responses=CONTROLS, response_class=Response)
async def finish_weight_update(body: FinishUpdate, request: Request) -> Response:
    """End the update; 409 naming what is missing when it is not whole."""
    return json_response({"result": await _llm(request).engine.call("finish_weight_update", body.weight_version)})


@router.post("/scale_elastic_ep", responses=CONTROLS, response_class=Response)
async def scale_elastic_ep(body: Scale, request: Request) -> Response:
    """Serve with another number of engines from now on, while requests run: none fails for it."""
    try:
        await _llm(request).scale_elastic_ep(body.new_data_parallel_size, body.drain_timeout)
    except TimeoutError:
        raise ApiError(408, f"requests of engines that leave did not end within {body.drain_timeout} s") from None
    return json_response({"message": f"Scaled to {body.new_data_parallel_size} data parallel engines"})


@router.get("/get_world_size", responses=CONTROLS, response_class=Response)
async def get_world_size(request: Request) -> Response:
    """The number of ranks that hold the model."""
    return json_response({"world_size": _llm(request).world_size})


@router.post("/collective_rpc", responses=CONTROLS, response_class=Response)
async def collective_rpc(body: RemoteCall, request: Request) -> Response:
    """Call a worker's method on every rank; only with enable_collective_rpc."""
    llm = _llm(request)
    if not serving(request).settings.enable_collective_rpc:
        raise ApiError(404, "collective_rpc calls any method of a worker: start with enable_collective_rpc to serve it")
    try:
        results = await llm.collective_rpc(body.method, body.timeout, body.args, body.kwargs)
    except TimeoutError:
        raise ValueError(f"{body.method} did not return within {body.timeout} s") from None
    return json_response({"results": results})
