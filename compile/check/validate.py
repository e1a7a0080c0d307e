"""Validate every rewrite: after each pass the graph must still compute what it did, in float64, on drawn inputs.

Translation validation (Pnueli, Siegel and Singerman 1998, https://doi.org/10.1007/BFb0054170) in place of a proof of
each pass: what is checked is this rewrite of this graph. In float64 the roundings of the model's dtype are gone, so a
pass may move them and nothing else.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from seamwise.compile.capture import Captured
from seamwise.compile.derive import evaluate
from seamwise.compile.explain.traffic import local_inputs
from seamwise.passes import Report
from seamwise.passes.graph import value

from .interpret import interpret

TOLERANCE = 1e-9  # relative; float64 sums in another order differ by about 1e-13


class InvalidRewrite(RuntimeError):
    """A pass changed what the graph computes."""


@dataclass(slots=True)
class Validator:
    """Holds the results of the graph before a pass; `check` compares with those after it.

    cases    named step inputs, each flattened in the graph's order
    buffers  the model's buffers; parameters are drawn, seeded by their names
    """

    captured: Captured
    cases: Mapping[str, Sequence[Tensor]]
    buffers: Mapping[str, Tensor]
    _before: dict[str, list[Tensor]] = field(default_factory=dict)
    _text: str = ""

    def __post_init__(self) -> None:
        self._before, self._text = self._results(), self._graph()

    def _graph(self) -> str:
        """Return all that the results follow from but the inputs: a pass that leaves it as it was need not be run."""
        nodes = self.captured.module.graph.nodes
        return "\n".join(f"{n} {n.target} {n.args} {n.kwargs} {n.meta.get('recipe')}" for n in nodes)

    def share(self) -> None:
        """Give this rank its part of the inputs, and of the results to compare with, as `shard` marked them."""
        local = local_inputs(self.captured.module)

        def cut(name: str, x: Tensor) -> Tensor:
            dim, start, end = local.get(name, (0, 0, x.shape[0]))
            return x.narrow(dim, start, end - start)

        floats = [
            n
            for n, x in zip(self.captured.inputs, next(iter(self.cases.values())), strict=True)
            if x.is_floating_point()
        ]
        self.cases = {case: [*map(cut, self.captured.inputs, inputs)] for case, inputs in self.cases.items()}
        self._before = {
            case: [*was[: -len(floats)], *map(cut, floats, was[-len(floats) :])] for case, was in self._before.items()
        }

    def check(self, report: Report, *, lossy: bool = False) -> None:
        """Put a certificate on the report. Raises InvalidRewrite naming the pass, the result, the case, the error.

        Of a lossy pass the error is stated, and refused only where it is no number.
        """
        text, worst = self._graph(), 0.0
        after, self._text = self._before if text == self._text else self._results(), text
        for case, results in after.items():
            for i, (was, now) in enumerate(zip(self._before[case], results, strict=True)):
                what = "the logits" if i == 0 else f"cache tensor {i - 1}"
                if was.shape != now.shape:
                    raise InvalidRewrite(
                        f"{report.name}: {what} had shape {tuple(was.shape)}, now {tuple(now.shape)}, for {case}"
                    )
                error = float((was - now).abs().max() / was.abs().max().clamp(min=1e-30)) if was.numel() else 0.0
                if not error <= (math.inf if lossy else TOLERANCE):
                    raise InvalidRewrite(
                        f"{report.name}: {what} changed by {error:.2e} of the largest value for {case}, wanted at most"
                        f" {TOLERANCE:g}; `seamwise bisect` with and without the pass names the first op that differs"
                    )
                worst = max(worst, error)
        report.certificate = {"cases": list(self.cases), "lossy": lossy, "max_error": worst}
        self._before = after

    def _results(self) -> dict[str, list[Tensor]]:
        return {case: self._run(inputs) for case, inputs in self.cases.items()}

    def _run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the logits and then every floating input, which may be a cache that the graph writes."""
        copies = [x.double() if x.is_floating_point() else x for x in inputs]
        given = dict(zip(self.captured.inputs, copies, strict=True))

        def placeholder(node: Node) -> Tensor:
            return given[node.name] if node.name in given else self._weight(node)

        results: tuple[Tensor, ...] = ()
        for node, outcome in interpret(self.captured.module, placeholder, "reference"):
            if node.op == "output":
                results = tuple(outcome)
        return [*results, *(x for x in given.values() if x.is_floating_point())]

    def _weight(self, node: Node) -> Tensor:
        name, fake = self.captured.weights.get(node.name, node.name), value(node)
        if name in self.buffers:
            return self.buffers[name]
        if "state" in node.meta.get("recipe", {}):
            return evaluate(node.meta["recipe"], self.buffers.__getitem__)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if not fake.dtype.is_floating_point:  # of a quantized weight: any bits are values
            size = (*fake.shape, fake.dtype.itemsize)
            return torch.randint(-127, 128, size, generator=generator, dtype=torch.int8).view(fake.dtype).squeeze(-1)
        drawn = torch.randn(tuple(fake.shape), generator=generator, dtype=torch.float32)
        if fake.dtype.itemsize == 1:
            return drawn.to(fake.dtype)
        return 1 + 0.1 * drawn if fake.dim() < 2 else drawn * fake.shape[-1] ** -0.5
