"""What an answer may look like when a request says which tools are called: a form in the model's own way of calling.

Sources: https://platform.openai.com/docs/guides/function-calling (tool_choice, strict),
https://docs.vllm.ai/en/latest/features/tool_calling.html.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from seamwise.runtime.sampling.structured import StructuredOutputsParams

Choice = Literal["none", "auto", "required"] | Mapping[str, Any]
# How each tool format (chat_parts.tool_format) opens a call of NAME before its arguments, and closes it after them.
_OPEN = {
    "hermes": '<tool_call>\n{"name": NAME, "arguments": ',
    "llama3_json": '{"name": NAME, "parameters": ',
}
_CLOSE = {"hermes": "}\n</tool_call>", "llama3_json": "}"}


def tool_form(
    functions: Sequence[Mapping[str, Any]], choice: Choice | None, written: str, *, parallel: bool
) -> StructuredOutputsParams | None:
    """Return the form that an answer must have; None when it may be anything.

    functions  {"name", "parameters": a JSON schema, "strict"} of each tool
    choice     OpenAI's tool_choice: "required" is one call or more, {"type": "function", "function": {"name"}} one
               call of that function; with "auto" or None only what is called with strict=True is held to its schema
    written    how the model writes calls, as chat_parts.tool_format says
    parallel   whether "required" may be more than one call

    Raises ValueError for a choice that names none of the functions, and for what the format cannot be held to.
    """
    if choice == "none":
        return None
    if isinstance(choice, Mapping):
        functions, parallel = [_named(functions, choice)], False
    elif choice != "required":
        return _strict(functions, written)
    calls = " | ".join(f"call_{i}" for i in range(len(functions)))
    again = r" (/\s*/ call)*" if parallel and written == "hermes" else ""  # a Llama 3 answer is one object
    rules = [f"start: call{again}", f"call: {calls}"]
    for i, function in enumerate(functions):
        opening, schema = json.dumps(_opening(written, function)), json.dumps(_arguments(function))
        rules.append(f"call_{i}: {opening} %json {schema} {json.dumps(_CLOSE[written])}")
    return StructuredOutputsParams(grammar="\n".join(rules))


def _strict(functions: Sequence[Mapping[str, Any]], written: str) -> StructuredOutputsParams | None:
    if not any(function.get("strict") for function in functions):
        return None
    if written != "hermes":
        raise ValueError(f"strict=True with tool_choice='auto': calls in {written} have no mark; use 'required'")
    structures = [
        {
            "begin": _opening(written, function), "end": _CLOSE[written],
            "schema": _arguments(function) if function.get("strict") else {"type": "object"},
        }
        for function in functions
    ]  # fmt: skip
    return StructuredOutputsParams(structural_tag={"structures": structures, "triggers": ["<tool_call>"]})


def _named(functions: Sequence[Mapping[str, Any]], choice: Mapping[str, Any]) -> Mapping[str, Any]:
    wanted = choice.get("function")
    name = wanted.get("name") if isinstance(wanted, Mapping) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        raise ValueError(
            f"tool_choice={choice!r}: wanted 'none', 'auto', 'required'"
            ' or {"type": "function", "function": {"name": …}}'
        )
    for function in functions:
        if function["name"] == name:
            return function
    raise ValueError(f"tool_choice: {name!r} is none of the tools {[function['name'] for function in functions]}")


def _opening(written: str, function: Mapping[str, Any]) -> str:
    return _OPEN[written].replace("NAME", json.dumps(function["name"], ensure_ascii=False))


def _arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", **(function.get("parameters") or {})}
