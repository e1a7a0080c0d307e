"""Who answers in `seamwise chat`: a model in this process, or a server."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
from collections.abc import Generator
from typing import Any, Protocol
from urllib.parse import urlsplit

Message = dict[str, str]


class Speaker(Protocol):
    """Answers conversations. name: how it is called."""

    name: str

    def answer(self, messages: list[Message], settings: dict[str, Any]) -> Generator[str]:
        """Yield the answer piece by piece; closing it early stops it. settings: of sampling, OpenAI's names."""


class LocalSpeaker:
    """A model that is loaded here."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        from .llm import LLM

        self._llm = LLM(model, **options)
        if self._llm.tokenizer is None:
            raise ValueError(f"{model}: has no tokenizer, which a chat needs")
        self.name = model
        self._ids = itertools.count()

    def answer(self, messages: list[Message], settings: dict[str, Any]) -> Generator[str]:
        from seamwise.runtime.sampling.params import SamplingParams

        engine, tokenizer = self._llm.engine, self._llm.tokenizer
        assert tokenizer is not None
        ids = tokenizer.apply_chat_template(messages)
        room = engine.runner.options.max_model_len - len(ids)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(ids)} tokens, the model takes {room + len(ids)}; /reset or /undo"
            )
        params = SamplingParams(**{**settings, "max_tokens": min(settings.get("max_tokens", room), room)})
        name, shown = f"chat-{next(self._ids)}", 0
        engine.add_request(name, ids, params)
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    text = output.outputs[0].text
                    yield text[shown:]
                    shown = len(text)
        finally:
            engine.abort_request(name)


class RemoteSpeaker:
    """A server with OpenAI's routes."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = urlsplit(url if "//" in url else f"http://{url}")
        if self._url.scheme not in ("http", "https") or not self._url.hostname:
            raise ValueError(f"url={url!r}: wanted an address like http://localhost:8000")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        with self._ask("GET", "/v1/models", None) as answer:
            self.name = json.load(answer)["data"][0]["id"]

    def answer(self, messages: list[Message], settings: dict[str, Any]) -> Generator[str]:
        body = {"model": self.name, "messages": messages, "stream": True, **settings}
        with self._ask("POST", "/v1/chat/completions", body) as answer:
            for line in answer:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise ValueError(event["error"]["message"])
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""

    def _ask(self, method: str, path: str, body: Any) -> http.client.HTTPResponse:
        """Send a request. Raises ValueError with the server's message for a status other than 200."""
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        assert self._url.hostname is not None
        connection = kind(self._url.hostname, self._url.port, timeout=300)
        base = self._url.path.rstrip("/").removesuffix("/v1")
        try:
            connection.request(method, base + path, None if body is None else json.dumps(body), self._headers)
            answer = connection.getresponse()
        except OSError as error:
            raise ValueError(f"{self._url.geturl()}: cannot be reached: {error}") from error
        if answer.status != 200:
            text = answer.read().decode(errors="replace")
            with contextlib.suppress(ValueError, KeyError, TypeError):
                text = json.loads(text)["error"]["message"]
            raise ValueError(f"{self._url.geturl()} answers {answer.status}: {text[:500]}")
        return answer
