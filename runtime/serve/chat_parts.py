"""What a chat answer consists of, told apart while it comes: reasoning, text, and calls of tools with arguments.

Models write calls as <tool_call>{"name": …, "arguments": {…}}</tool_call> (Hermes, Qwen, SmolLM 3) or as one JSON
object that is the whole answer, {"name": …, "parameters": {…}} (Llama 3); reasoning as <think> … </think>.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

_NAME = re.compile(r'\s*\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_OTHER_CALLS = ("<function=", "<arg_key>")  # what is no JSON between the marks: Qwen3-Coder, GLM 4.5


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
    _held: str = ""
    _started: bool = False
    _after_mark: bool = False  # newlines that follow belong to the mark
    _scan: _Arguments | None = None
    _whole: _Arguments | None = None  # of an object that has no end yet, of which so many characters are seen
    _seen: int = 0

    def feed(self, text: str) -> list[Part]:
        """Take more text and return what it certainly is; what may yet become a mark waits."""
        self._held += text
        return list(self._joined(self._read(ended=False)))

    def end(self) -> list[Part]:
        """Return what waited: the text has ended."""
        return list(self._joined(self._read(ended=True)))

    @staticmethod
    def _joined(parts: Iterator[Part]) -> Iterator[Part]:
        return (part for part in parts if part.text or part.kind == "call")

    def _read(self, *, ended: bool) -> Iterator[Part]:
        while self._held:
            if self._after_mark and self._scan is None:
                self._held = self._held.lstrip("\n")
                self._after_mark = not self._held
            before = len(self._held), self._started
            if self._scan is not None:
                yield from self._read_arguments()
            elif self.thinking:
                yield from self._read_reasoning(ended)
            elif self.tools == "llama3_json" and not self._started:
                yield from self._read_bare_call(ended)
            else:
                yield from self._read_text(ended)
            if (len(self._held), self._started) == before:
                return

    def _read_reasoning(self, ended: bool) -> Iterator[Part]:
        assert self.reasoning is not None
        close = self.reasoning[1]
        thought, found, rest = self._held.partition(close)
        if found:
            self.thinking, self._held, self._after_mark = False, rest, True
            yield Part("reasoning", thought)
        else:
            cut = len(thought) if ended else len(thought) - _overlap(thought, close)
            self._held = thought[cut:]
            yield Part("reasoning", thought[:cut])

    def _read_text(self, ended: bool) -> Iterator[Part]:
        marks = []
        if self.reasoning is not None and not self._started:
            marks.append(self.reasoning[0])
        if self.tools == "hermes":
            marks.append("<tool_call>")
        found = [(at, mark) for mark in marks if (at := self._held.find(mark)) >= 0]
        if not found:
            cut = len(self._held) - (0 if ended else max((_overlap(self._held, mark) for mark in marks), default=0))
            if self.tools == "hermes" and not ended:  # space before a call belongs to neither
                cut = len(self._held[:cut].rstrip())
            text, self._held = self._held[:cut], self._held[cut:]
            if self.tools == "hermes" and self.num_calls and not text.strip():  # between two calls
                return
            self._started = self._started or bool(text.strip())
            yield Part("text", text)
            return
        at, mark = min(found)
        if mark == "<tool_call>":
            yield from self._read_call(at, ended)
        else:
            before, self._held = self._held[:at], self._held[at + len(mark) :]
            self._started = self.thinking = self._after_mark = True
            yield Part("text", before.strip())

    def _read_call(self, at: int, ended: bool) -> Iterator[Part]:
        """Read a call from its mark: as soon as its name is known, its arguments follow as they come."""
        inside = self._held[at + len("<tool_call>") :]
        if at:
            before, self._held = self._held[:at], self._held[at:]
            self._started = self._started or bool(before.strip())
            yield Part("text", before.rstrip())
            return
        parts = self._read_object(inside, "</tool_call>")
        if parts is None or (ended and not parts):  # it is no call: give it as it is
            parts, self._held = [Part("text", self._held)], ""
        yield from parts

    def _read_bare_call(self, ended: bool) -> Iterator[Part]:
        """Read a call that is all of the answer, or follows another one."""
        if self.num_calls and ended and not self._held.strip("; \n"):
            self._held = ""
        parts = self._read_object(self._held.lstrip("; \n") if self.num_calls else self._held, "}")
        self._started = parts is None or (ended and not parts)  # an answer in words
        yield from parts or ()

    def _read_object(self, text: str, close: str) -> list[Part] | None:
        """Return the parts of a call that begins here, [] where that is not certain yet, None where none does.

        Arguments behind the name are given as they come; keys in another order wait for the object's end.
        """
        if match := _NAME.match(text):
            self._held = text[match.end() :]
            return [self._call(match[1], close)]
        if text.strip() and not text.lstrip().startswith("{"):
            return None
        whole = self._whole or _Arguments(0, "", "")
        size = self._seen + whole.advance(text[self._seen :])
        self._whole, self._seen = (None, 0) if whole.ended else (whole, size)
        if not whole.ended:
            return []
        if (found := _whole_call(text[:size])) is None:
            return None
        name, arguments = found
        call = self._call(name, close)
        assert self._scan is not None
        self._scan.ended, self._held = True, text[size - 1 :]
        return [call, Part("arguments", arguments, call.call, call.call_id)]

    def _call(self, name: str, close: str) -> Part:
        self._scan = _Arguments(self.num_calls, f"call_{uuid.uuid4().hex[:24]}", close)
        self.num_calls += 1
        self._whole, self._seen = None, 0
        return Part("call", name, self._scan.call, self._scan.call_id)

    def _read_arguments(self) -> Iterator[Part]:
        scan = self._scan
        assert scan is not None
        if not scan.ended:
            size = scan.advance(self._held)
            text, self._held = self._held[:size], self._held[size:]
            yield Part("arguments", text, scan.call, scan.call_id)
        if scan.ended and (rest := self._held.lstrip()):
            end = "}" + scan.close if scan.close.startswith("<") else scan.close
            tight = re.sub(r"^\}\s*", "}", rest)
            if tight.startswith(end):
                self._held, self._scan, self._after_mark = rest.partition(scan.close)[2], None, True
            elif not end.startswith(tight):
                self._scan, self._held = None, rest.removeprefix("}")


@dataclass(slots=True)
class _Arguments:
    """Finds the end of a JSON object that comes in pieces."""

    call: int
    call_id: str
    close: str
    depth: int = 0
    quoted: bool = False
    escaped: bool = False
    ended: bool = field(default=False)

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


def _whole_call(text: str) -> tuple[str, str] | None:
    """Return the name and the arguments' JSON of a call in one object, whatever stands beside them; None: no call."""
    try:
        found = json.loads(text)
        given = found.get("arguments", found.get("parameters"))
        given = json.loads(given) if isinstance(given, str) else {} if given is None else given
    except (ValueError, RecursionError):
        return None
    fits = isinstance(found.get("name"), str) and isinstance(given, dict)
    return (found["name"], json.dumps(given, ensure_ascii=False)) if fits else None


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
