"""What an output must look like: one of vLLM's StructuredOutputsParams, and the grammar that says so.

Source: https://docs.vllm.ai/en/latest/features/structured_outputs.html; grammars are llguidance's,
https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seamwise.extras import pip_install

_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
# What one grammar may cost, at llguidance's stated speeds: 20 ms to begin with, 15 ms a token, and 64 MB of states.
LIMITS = {
    "initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 200_000, "step_max_items": 50_000, "max_lexer_states": 40_000,
    "max_grammar_size": 200_000,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """One form of an output; exactly one of the first six is given.

    json         a JSON schema, as an object or as its text
    regex        a regular expression that the whole output matches
    choice       the output is one of these texts
    grammar      a Lark grammar, or EBNF in GBNF's spelling ("root ::= …")
    json_object  True: any JSON object
    structural_tag  text in which a trigger begins a part of a given schema:
                 {"structures": [{"begin", "schema", "end"}], "triggers": […]}, as an object or as its text
    disable_any_whitespace  JSON without optional white space
    reasoning    (opening, closing) marks of free text that may come before the form; with an empty opening the
                 prompt has opened it already, and the text comes in any case
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    disable_any_whitespace: bool = False
    reasoning: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs: got {', '.join(given) or 'nothing'}, wanted one of {', '.join(_KINDS)}"
            )
        wanted: dict[str, tuple[type, ...]] = {
            "json": (str, Mapping), "regex": (str,), "grammar": (str,), "structural_tag": (str, Mapping),
        }  # fmt: skip
        (kind,) = given
        value = getattr(self, kind)
        if kind in wanted and (not isinstance(value, wanted[kind]) or not value):
            raise ValueError(
                f"structured_outputs: {kind}={value!r}, wanted {' or '.join(t.__name__ for t in wanted[kind])}"
            )
        if kind == "json_object" and value is not True:
            raise ValueError(f"structured_outputs: json_object={value!r}, wanted True, or leave it out")
        if kind == "choice":
            texts = (
                isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(t, str) for t in value)
            )
            if not texts or not value or not all(value):
                raise ValueError(f"structured_outputs: choice={value!r}, wanted a list of non-empty texts")

    def as_grammar(self) -> str:
        """Return llguidance's grammar. Raises ValueError naming what is wrong, or that llguidance is not installed."""
        return self._form() if self.reasoning is None else _after(self.reasoning, self._form())

    def _form(self) -> str:
        matcher = guidance().LLMatcher
        spaced = {"whitespace_flexible": not self.disable_any_whitespace}
        if self.json is not None:
            return str(matcher.grammar_from_json_schema(_schema("json", self.json), overrides=spaced))
        if self.json_object:
            return str(matcher.grammar_from_json_schema('{"type": "object"}', overrides=spaced))
        if self.regex is not None:
            return str(matcher.grammar_from_regex(self.regex))
        if self.choice is not None:
            return str(matcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in self.choice)))
        if self.grammar is not None:
            from llguidance.gbnf_to_lark import any_to_lark

            return str(matcher.grammar_from_lark(any_to_lark(self.grammar)))
        assert self.structural_tag is not None
        return _tagged(_schema("structural_tag", self.structural_tag))

    def check(self) -> None:
        """Raise ValueError for a grammar that is none, or that costs more than LIMITS.

        Takes milliseconds, and tenths of a second for a megabyte of alternatives; other threads run meanwhile.
        """
        library = guidance()
        limits = library.LLParserLimits(**LIMITS)
        refused, messages = library.LLMatcher.validate_grammar_with_warnings(self.as_grammar(), None, limits=limits)
        if refused:
            wrong = _first_line(messages[0])
            if "coerce_one_of" in wrong:  # it names an option that a schema itself can set
                wrong += '; put "x-guidance": {"coerce_one_of": true} into the schema'
            raise ValueError(f"structured_outputs: {wrong}")


def guidance() -> Any:
    """Return the library. Raises ValueError where it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise ValueError(
            f"structured_outputs needs the package llguidance; install it: {pip_install('grammar')}"
        ) from None
    return llguidance


def _schema(name: str, given: str | Mapping[str, Any]) -> str:
    try:
        text = given if isinstance(given, str) else json.dumps(given)
        found = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"structured_outputs: {name} is no JSON: {error}") from None
    if not isinstance(found, (dict, bool)):
        raise ValueError(f"structured_outputs: {name} is {text[:80]}, wanted a JSON object")
    return text


def _tagged(text: str) -> str:
    from llguidance import StructTag

    given = json.loads(text)
    try:
        triggers, tags = list(given["triggers"]), []
        for structure in given["structures"]:
            begin, end, schema = str(structure["begin"]), str(structure.get("end", "")), structure["schema"]
            trigger = next((t for t in triggers if begin.startswith(t)), None)
            if trigger is None:
                raise ValueError(f"no trigger of {triggers} begins {begin!r}")
            tags.append(StructTag(trigger=trigger, begin=begin, grammar=schema, end=end))
        return str(StructTag.to_grammar(tags, assume_special=False))  # text: a special token would not be shown
    except (KeyError, TypeError, AttributeError, AssertionError, ValueError) as error:
        raise ValueError(
            "structured_outputs: structural_tag wants"
            f' {{"structures": [{{"begin", "schema", "end"}}], "triggers": […]}}: {error!r}'
        ) from None


def _after(reasoning: tuple[str, str], form: str) -> str:
    """Return the grammar of free text between the marks, then the form."""
    opening, closing = (json.dumps(mark) for mark in reasoning)
    thought = "thought" if not reasoning[0] else f"({opening} thought)?"
    start = f"start: {thought} SPACE @form\nthought[suffix={closing}]: /(?s:.*)/\nSPACE: /\\s*/"
    first, *rest = json.loads(form)["grammars"] if form.startswith("{") else [{"lark_grammar": form}]
    return json.dumps({"grammars": [{"lark_grammar": start}, {**first, "name": "form"}, *rest]})


def _first_line(message: str) -> str:
    lines = [line.strip() for line in str(message).splitlines() if line.strip()]
    return (lines[0] if lines else "the grammar is refused")[:400]
