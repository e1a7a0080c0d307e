"""One program of the lowered graphs of all ranges of tokens: its text, its weights, and what is told of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from seamwise.compile.check.awaited import order_of
from seamwise.compile.explain.live_bytes import live_bytes
from seamwise.compile.explain.traffic import collectives_of, kv_bytes, local_inputs, weight_bytes
from seamwise.passes import Report

from .capture import Captured
from .codegen import Source
from .derive import Recipe
from .program import Program, TokenRange
from .split import Piece, Seam


@dataclass(frozen=True, slots=True, kw_only=True)
class LoweredStep:
    """The lowered graph of the steps of one range of numbers of tokens, from `first` on."""

    first: int
    graph: Captured
    steps: list[Piece | Seam]
    recipes: dict[str, Recipe]
    reports: list[Report]
    providers: Counter[str]


def generate(made: Sequence[LoweredStep], *, in_turns: bool = False) -> Program:
    """Write one program of all ranges: equal pieces are written, equal weights held, and equal reports told once."""
    source, written, places, ranges = Source(in_turns=in_turns), set[str](), dict[str, int](), list[TokenRange]()
    recipes: dict[str, Recipe] = {}
    reports, told = list[Report](), set[tuple[str, int, int | None]]()
    for step in made:
        index, calls = {}, []
        for name, recipe in step.recipes.items():
            if (key := str(recipe)) not in places:
                places[key] = len(recipes)
                recipes[name if name not in recipes else f"{name}_from_{step.first}"] = recipe
            index[name] = places[key]
        for item in step.steps:
            if isinstance(item, Piece):
                calls.append(name := f"piece_{item.digest}")
                if name not in written:
                    source.add_piece(name, item)
                written.add(name)
        (output,) = step.graph.graph.find_nodes(op="output")
        function = "step" if step.first == 1 else f"step_from_{step.first}"
        source.add_step(function, step.steps, step.graph.inputs, index, [n.name for n in output.args[0]])
        found = collectives_of(step.graph.module)
        turning = [name for name in calls if name in source.turning]
        ranges.append(
            TokenRange(
                first=step.first, function=function, calls=calls, collectives=found, turning=turning,
                said=order_of(step.graph.module),
            )
        )  # fmt: skip
        news = [r for r in step.reports if (r.name, r.matched, r.expected) not in told]
        told |= {(r.name, r.matched, r.expected) for r in news}
        reports += news
    first, module, live = made[0], made[0].graph.module, [live_bytes(step.graph.module) for step in made]
    return Program(
        source=source.text(),
        ranges=ranges,
        num_seams=sum(isinstance(a, Seam) and not isinstance(b, Seam) for a, b in pairwise([*first.steps, None])),
        num_seam_calls=sum(isinstance(item, Seam) for item in first.steps),
        recipes=recipes,
        inputs=first.graph.inputs,
        reports=reports,
        providers=dict(sorted(first.providers.items())),
        weight_bytes=weight_bytes(module),
        kv_bytes=kv_bytes(module),
        token_bytes=max(tokens for tokens, _ in live),
        logit_bytes=max(logits for _, logits in live),
        local_inputs=local_inputs(module),
    )
