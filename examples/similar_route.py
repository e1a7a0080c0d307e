"""A worked example of a route: requests go to the model whose sample questions they resemble most.

    route = SimilarRoute({"coder": ["write a function …"], "writer": ["a poem about …"]})
    app = build_app(Serving({"coder": a, "writer": b}, settings, route))

Resemblance is the cosine of word and letter-triple counts, weighted by rarity: enough to show the hook, and no model.
A route that asks an embedding model instead has the same form. What the client asks for by name stays as it is, unless
it asks for "auto".
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request


class SimilarRoute:
    """Chooses among models by examples of what each is for; None below the threshold."""

    def __init__(self, examples: Mapping[str, Sequence[str]], *, threshold: float = 0.1) -> None:
        """examples: model -> texts; the first model is for what resembles none."""
        if not examples or not all(examples.values()):
            raise ValueError(f"examples={dict(examples)!r}: wanted at least one text for each model")
        self._threshold, self._otherwise = threshold, next(iter(examples))
        counts = [(name, _features(text)) for name, texts in examples.items() for text in texts]
        held = Counter(feature for _, found in counts for feature in found)
        self._rarity = {feature: math.log(1 + len(counts) / count) for feature, count in held.items()}
        self._examples = [(name, self._vector(found)) for name, found in counts]

    def __call__(self, asked: str, request: Request, body: Any) -> str | None:
        """The hook: a request for "auto" goes where its prompt or last message belongs."""
        return (self.choose(_text_of(body)) or self._otherwise) if asked == "auto" else None

    def choose(self, text: str) -> str | None:
        """Return the model whose examples are nearest."""
        vector = self._vector(_features(text))
        nearest, name = max((_dot(vector, example), name) for name, example in self._examples)
        return name if nearest >= self._threshold else None

    def _vector(self, features: Counter[str]) -> dict[str, float]:
        weighted = {f: count * self._rarity[f] for f, count in features.items() if f in self._rarity}
        size = math.sqrt(sum(value * value for value in weighted.values())) or 1.0
        return {f: value / size for f, value in weighted.items()}


def _text_of(body: Any) -> str:
    messages = getattr(body, "messages", None)
    if messages and not callable(messages):
        return str(messages[-1].text())
    text = getattr(body, "prompt", None) or getattr(body, "input", None)
    return text if isinstance(text, str) else ""


def _features(text: str) -> Counter[str]:
    words = re.findall(r"\w+", text.lower())
    return Counter(words) + Counter(word[i : i + 3] for word in words for i in range(len(word) - 2))


def _dot(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    return sum(value * b.get(feature, 0.0) for feature, value in a.items())
