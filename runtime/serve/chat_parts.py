"""What a chat answer consists of, told apart while it comes: reasoning, text, and calls of tools with arguments.

Models write calls as <tool_call>{"name": …, "arguments": {…}}</tool_call> (Hermes, Qwen, SmolLM 3) or as one JSON
object that is the whole answer, {"name": …, "parameters": {…}} (Llama 3); reasoning as <think> … </think>.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

_NAME = re.compile(r'\s*\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_OTHER_CALLS = ("<function=", "<arg_key>")  # what is no JSON between the marks: Qwen3-Coder, GLM 4.5
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_END = re.compile(r"^\s*(\}\s*(</tool_call>)?)?")  # of a call, behind its arguments


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of an answer. kind "call" starts a tool call (text: its name), "arguments" goes on with its JSON."""

    kind: Literal["text", "reasoning", "call", "arguments"]
    text: str
    call: int = 0
    call_id: str = ""


@dataclass(slots=True)
class ChatParts:
    """Reads one answer piece by piece.

    tools      how calls are written, None when the request allows none
    reasoning  the marks around it, None when the model has none
    thinking   whether the answer starts inside the reasoning (its first mark stands in the prompt)
    """

    tools: str | None = None
    reasoning: tuple[str, str] | None = None
    thinking: bool = False
    num_calls: int = 0
    _held: str = ""  # what may yet become a mark
    _ended: bool = False
    _parts: Iterator[Part | None] = field(init=False)

    def __post_init__(self) -> None:
        self._parts = self._read()

    def feed(self, text: str) -> list[Part]:
        """Take more text and return what it certainly is; what may yet become a mark waits."""
        self._held += text
        return self._certain()

    def end(self) -> list[Part]:
        """Return what waited: the text has ended."""
        self._ended = True
        return self._certain()

    def _certain(self) -> list[Part]:
        parts = iter(lambda: next(self._parts, None), None)
        return [part for part in parts if part is not None and (part.text or part.kind == "call")]

    def _read(self) -> Iterator[Part | None]:
        """Read an answer from its first to its last character; None stands where more text is to come first."""
        if self.reasoning is not None:
            mark, close = self.reasoning
            yield from self._until(lambda: not _may_become(self._held.lstrip(), mark))
            if not self.thinking and self._held.lstrip().startswith(mark):
                self.thinking, self._held = True, self._held.lstrip()[len(mark) :]
                yield from self._newlines()
            if self.thinking and (yield from self._upto(close, "reasoning")):
                yield from self._newlines()
        if self.tools == "llama3_json":
            while (yield from self._object(marked=False)):
                yield from self._until(lambda: bool(self._held.strip("; \n")))
                rest = self._held.lstrip("; \n")
                self._held = rest if rest[:1] in ("", "{") else self._held
        while (yield from self._upto(_OPEN if self.tools == "hermes" else "", "text")):
            if not (yield from self._object(marked=True)):
                yield Part("text", _OPEN)  # it is no call: give it as it is

    def _until(self, enough: Callable[[], bool]) -> Iterator[None]:
        """Wait for more text until it is enough, or all."""
        while not (enough() or self._ended):
            yield None

    def _newlines(self) -> Iterator[None]:
        """Leave out the newlines that belong to the mark before them."""
        yield from self._until(lambda: bool(self._held.lstrip("\n")))
        self._held = self._held.lstrip("\n")

    def _upto(self, mark: str, kind: Literal["text", "reasoning"]) -> Generator[Part | None, None, bool]:
        """Give what comes before a mark, all where there is none; return whether it came."""
        while True:
            before, found, rest = self._held.partition(mark) if mark else (self._held, "", "")
            if kind == "text" and found:
                before = before.rstrip()
            elif not found and not self._ended:
                cut = len(before) - _overlap(before, mark)
                if kind == "text" and self.tools:  # space before a call belongs to neither
                    cut = len(before[:cut].rstrip())
                before, rest = before[:cut], before[cut:]
            self._held = rest
            if before.strip() or not self.num_calls:  # else it stands between two calls, or behind the last
                yield Part(kind, before)
            if found or self._ended:
                return bool(found)
            yield None

    def _object(self, *, marked: bool) -> Generator[Part | None, None, bool]:
        """Read a call if one begins here, and return whether: what is behind its name comes as it is written, and keys
        in another order come at the object's end. Without a mark before it an object without arguments is none."""
        whole, seen = _Object(), 0

        def known() -> bool:
            nonlocal seen
            text = self._held.lstrip()
            if not whole.ended and text.startswith("{"):
                seen += whole.advance(self._held[seen:])
            return bool(whole.ended or _NAME.match(self._held) or (text and not text.startswith("{")))

        yield from self._until(known)
        if match := _NAME.match(self._held):
            yield from self._call(match)
        elif whole.ended and (found := _whole_call(self._held[:seen], marked)):
            yield (call := self._named(found[0], seen - 1))
            yield replace(call, kind="arguments", text=found[1])
            yield from self._end_of_call()
        else:
            return False
        return True

    def _named(self, name: str, size: int) -> Part:
        """Return the call that begins with so many characters."""
        self._held, self.num_calls = self._held[size:], self.num_calls + 1
        return Part("call", name, self.num_calls - 1, f"call_{uuid.uuid4().hex[:24]}")

    def _call(self, match: re.Match[str]) -> Iterator[Part | None]:
        """Give a call that begins so, its arguments as they come, and leave out its end."""
        yield (call := self._named(match[1], match.end()))
        arguments = _Object()
        while not arguments.ended and (self._held or not self._ended):
            size = arguments.advance(self._held)
            text, self._held = self._held[:size], self._held[size:]
            yield replace(call, kind="arguments", text=text)
            yield from self._until(lambda: arguments.ended or bool(self._held))
        yield from self._end_of_call()

    def _end_of_call(self) -> Iterator[None]:
        """Leave out what closes a call behind its arguments."""

        def ends() -> bool:
            return _may_become("".join(self._held.split()), "}" + _CLOSE)

        yield from self._until(lambda: not ends())
        self._held = "" if ends() else _END.sub("", self._held)
        yield from self._newlines()


@dataclass(slots=True)
class _Object:
    """Finds the end of a JSON object that comes in pieces."""

    depth: int = 0
    quoted: bool = False
    escaped: bool = False
    ended: bool = False

    def advance(self, text: str) -> int:
        """Return how many characters of `text` still belong to the object."""
        for i, c in enumerate(text):
            if self.quoted:
                self.quoted = self.escaped or c != '"'
                self.escaped = c == "\\" and not self.escaped
            elif c == '"':
                self.quoted = True
            elif c in "{[":
                self.depth += 1
            elif c in "}]":
                self.depth -= 1
                if not self.depth:
                    self.ended = True
                    return i + 1
        return len(text)


def _whole_call(text: str, marked: bool) -> tuple[str, str] | None:
    """Return the name and the arguments' JSON of a call in one object, whatever stands beside them; None: no call."""
    try:
        found = json.loads(text)
        given = found.get("arguments", found.get("parameters"))
        given = json.loads(given) if isinstance(given, str) else {} if given is None else given
    except (ValueError, RecursionError):
        return None
    said = marked or not found.keys().isdisjoint(("arguments", "parameters"))
    fits = said and isinstance(found.get("name"), str) and isinstance(given, dict)
    return (found["name"], json.dumps(given, ensure_ascii=False)) if fits else None


def _may_become(text: str, mark: str) -> bool:
    return mark.startswith(text) and text != mark


def _overlap(text: str, mark: str) -> int:
    """Return the length of the longest tail of `text` that starts `mark`."""
    for size in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:size]):
            return size
    return 0


def tool_format(template: str) -> str | None:
    """Return how a model whose chat template this is writes calls; None for one without tools, or with other calls."""
    if "tools" not in template:
        return None
    if "<tool_call>" in template:
        return None if any(mark in template for mark in _OTHER_CALLS) else "hermes"
    return "llama3_json" if '"parameters"' in template or "python_tag" in template else None


def reasoning_marks(template: str) -> tuple[str, str] | None:
    """Return the marks around a model's reasoning, when its chat template knows of any."""
    return ("<think>", "</think>") if "</think>" in template else None
