"""Batch files of OpenAI: requests in, answers out, line by line; what was answered is not asked again.

Source: https://platform.openai.com/docs/api-reference/batch
"""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from .async_llm import AsyncLLM
from .http.app import build_app
from .http.serving import Serving
from .http.settings import ServeSettings

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")


@dataclass(slots=True)
class BatchFile:
    """left: requests without an answer. num_done: answers in the output file."""

    output: Path
    left: list[dict[str, Any]] = field(default_factory=list)
    num_done: int = 0

    @classmethod
    def open(cls, source: Path, output: Path) -> BatchFile:
        """Read requests and the answers there are; half a line, left by a kill, is cut off.

        Raises ValueError naming the line that is no request, or the file that cannot be read or written.
        """
        try:
            text = source.read_text()
            done = _answered(output)
            output.touch()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{error.__class__.__name__}: {error}; wanted an input file and a place to write"
            ) from error
        requests: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            one = _request(line, f"{source}:{number}")
            if one["custom_id"] in requests:
                raise ValueError(f"{source}:{number}: custom_id {one['custom_id']!r} comes twice; wanted each once")
            requests[one["custom_id"]] = one
        return cls(output, [one for name, one in requests.items() if name not in done], len(done & requests.keys()))

    def write(self, request: dict[str, Any], status: int, body: Any) -> None:
        """Append one answer, so that it is there whatever comes."""
        answer: dict[str, Any] = {
            "id": f"batch_req_{uuid.uuid4().hex}", "custom_id": request["custom_id"],
            "response": {"status_code": status, "request_id": uuid.uuid4().hex, "body": body},
            "error": None if status == 200 else {"code": str(status), "message": body["error"]["message"]},
        }  # fmt: skip
        with self.output.open("a") as file:
            file.write(json.dumps(answer, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.num_done += 1


def _answered(output: Path) -> set[str]:
    """Return the custom_ids with an answer; a last line without its end is taken out of the file."""
    if not output.exists():
        return set()
    data = output.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with output.open("r+b") as file:
            file.truncate(len(whole))
    try:
        return {json.loads(line)["custom_id"] for line in whole.splitlines()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{output}: is no file of answers ({error}); choose another output file") from None


def _request(line: str, where: str) -> dict[str, Any]:
    try:
        one = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: is not JSON: {error}") from None
    wanted = '{"custom_id": str, "method": "POST", "url": "/v1/…", "body": {…}}'
    if not isinstance(one, dict) or not isinstance(one.get("custom_id"), str) or not isinstance(one.get("body"), dict):
        raise ValueError(f"{where}: wanted {wanted}")
    if one.get("method", "POST") != "POST" or one.get("url") not in ROUTES:
        raise ValueError(f"{where}: {one.get('method')} {one.get('url')!r}, wanted POST and one of {', '.join(ROUTES)}")
    if one["body"].get("stream"):
        raise ValueError(f"{where}: stream=true: a file of answers has no streams; leave it out")
    return one


async def run_batch(llm: AsyncLLM, batch: BatchFile, model: str | None, concurrency: int) -> int:
    """Answer what is left; return how many answers are errors. Raises RuntimeError when the engine was given up."""
    from tqdm import tqdm

    names = {one["body"].get("model") for one in batch.left} | {model or "model"}
    if model is not None and (unknown := {name for name in names if name} - {model}):
        raise ValueError(f"model {min(unknown)!r} is asked for; served is {model!r}")
    settings = ServeSettings(max_concurrent_requests=1 << 20, max_num_queued_reqs=1 << 20, max_body_bytes=1 << 30)
    state = Serving({name: llm for name in names if name}, settings)
    app, errors, queue = build_app(state), 0, iter(batch.left)
    await llm.ready()
    with tqdm(total=batch.num_done + len(batch.left), initial=batch.num_done, desc="run-batch", unit="request") as bar:

        async def work() -> None:
            nonlocal errors
            for request in queue:
                status, body = await _post(app, request["url"], request["body"])
                if status == 503:  # the engine starts again; a request that ended it may not end it for ever
                    await llm.ready()
                    status, body = await _post(app, request["url"], request["body"])
                batch.write(request, status, body)
                errors += status != 200
                bar.update()

        try:
            await asyncio.gather(*(work() for _ in range(min(concurrency, len(batch.left)))))
        finally:
            await llm.shutdown()
    return errors


async def _post(app: ASGIApp, path: str, body: Any) -> tuple[int, Any]:
    """Call the application without a socket."""
    data, parts, status = json.dumps(body).encode(), [], 0
    sent = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if sent.is_set():
            await asyncio.Event().wait()  # the client never leaves
        sent.set()
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message: Any) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path,
        "raw_path": path.encode(), "root_path": "", "scheme": "http", "query_string": b"", "client": None,
        "server": ("batch", 80), "headers": [(b"content-type", b"application/json")],
    }  # fmt: skip
    await app(scope, receive, send)
    return status, json.loads(b"".join(parts))
