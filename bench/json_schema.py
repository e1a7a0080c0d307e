"""`seamwise bench json-schema`: what of JSON Schema a grammar holds to, by the JSON Schema Test Suite.

Each schema of the suite becomes a grammar, each of its instances a text. A schema that is refused says why; one that
is served must accept no invalid instance ("wrong"). That it does not accept some valid ones ("narrower": it fixes the
order of properties, for one) makes an answer no less right.

Suite: https://github.com/json-schema-org/JSON-Schema-Test-Suite; it lies in json/ of jsonschema's source archive.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seamwise.runtime.sampling.structured import StructuredOutputsParams, guidance

from .command_line import command_line, parse, save


@dataclass(slots=True)
class Keyword:
    """The verdicts of one file of the suite; `schemas` are served or refused, `instances` are those of the served."""

    name: str
    served: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    right: int = 0
    narrower: int = 0
    wrong: list[str] = field(default_factory=list)


def examine(suite: Path, draft: str) -> Iterator[Keyword]:
    """Yield the verdicts of each keyword. Raises ValueError where the suite is not there."""
    folder = suite / "tests" / draft
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"{folder}: no tests; wanted the folder json/ of jsonschema's source archive")
    tokenizer = guidance().LLTokenizer("byte")
    for file in files:
        keyword = Keyword(file.stem)
        for group in json.loads(file.read_text()):
            _group(keyword, group, tokenizer)
        yield keyword


def _group(keyword: Keyword, group: dict[str, Any], tokenizer: Any) -> None:
    try:
        params = StructuredOutputsParams(json=json.dumps(group["schema"]))
        params.check()
        grammar = params.as_grammar()
    except ValueError as error:
        keyword.refused[str(error).removeprefix("structured_outputs: ")] += 1
        return
    keyword.served += 1
    for test in group["tests"]:
        accepted = any(_accepts(grammar, text, tokenizer) for text in _texts(test["data"]))
        if accepted == test["valid"]:
            keyword.right += 1
        elif test["valid"]:
            keyword.narrower += 1
        else:
            keyword.wrong.append(f"{group['description']}: {test['description']}: {json.dumps(test['data'])[:80]}")


def _texts(value: Any) -> Iterator[str]:
    """Yield a value as JSON, an object of up to four properties in every order of them."""
    if isinstance(value, dict) and 1 < len(value) <= 4:
        for items in itertools.permutations(value.items()):
            yield json.dumps(dict(items))
    else:
        yield json.dumps(value)


def _accepts(grammar: str, text: str, tokenizer: Any) -> bool:
    matcher = guidance().LLMatcher(tokenizer, grammar)
    data = list(text.encode())
    return bool(matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting())


def main(arguments: list[str]) -> int:
    """`seamwise bench json-schema`. The status is 1 when an invalid instance is accepted."""
    parser = command_line("json-schema", __doc__, model=False, cpu=False)
    parser.add_argument("--suite", type=Path, required=True, help="the folder json/ of jsonschema's source archive")
    parser.add_argument("--draft", default="draft2020-12")
    options = parse(parser, arguments)
    found = list(examine(options.suite, options.draft))
    print(f"{'keyword':24} {'served':>6} {'refused':>7}  {'right':>5} {'narrower':>8} {'wrong':>5}")
    for one in found:
        counts = f"{one.served:6} {one.refused.total():7}  {one.right:5} {one.narrower:8} {len(one.wrong):5}"
        reason = one.refused.most_common(1)[0][0][:70] if one.refused else ""
        print(f"{one.name:24} {counts}  {reason}")
        for wrong in one.wrong:
            print(f"    wrong: {wrong}")
    rows = [
        {
            "keyword": one.name, "served": one.served, "refused": dict(one.refused), "right": one.right,
            "narrower": one.narrower, "wrong": one.wrong,
        }
        for one in found
    ]  # fmt: skip
    save(options, draft=options.draft, keywords=rows)
    return int(any(one.wrong for one in found))
