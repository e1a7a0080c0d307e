"""Compare two runs of one model op by op, and name the first op at which they differ.

Ops of the two graphs are paired by module path, op, order within that module and shape, so a graph with a fusion and
one without meet at every op that both have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from seamwise.kernels.contract import contract_of
from seamwise.passes.graph import is_weight, place

from .interpret import SEMANTICS, interpret

Key = tuple[str, str, int]  # module path, op, how many of that op came before in that module


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One side of a comparison: a graph, its placeholders' values, and the semantics it runs in."""

    module: GraphModule
    given: Callable[[Node], Any]
    semantics: str

    def __post_init__(self) -> None:
        if self.semantics not in SEMANTICS:
            raise ValueError(f"bisect: semantics={self.semantics!r}; wanted one of {', '.join(SEMANTICS)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How two values of one op differ. `ulps`: lower bound of a bucket -> elements, in steps of the coarser dtype."""

    module: str
    op: str
    relative_rms: float
    largest: float
    ulps: dict[int, int]


@dataclass(slots=True, kw_only=True)
class Comparison:
    """Every op that both runs have, in order, and the first whose relative RMS is beyond the tolerance."""

    differences: list[Difference] = field(default_factory=list)
    first: Difference | None = None
    agreed_before: Difference | None = None
    only_in_a: int = 0
    only_in_b: int = 0


def compare(a: Run, b: Run, *, tolerance: float) -> Comparison:
    """Run both and compare; memory holds one run's op results. Raises ValueError when the runs share no op."""
    left = {key: value.cpu() for key, value in _values(a)}
    result, met = Comparison(), 0
    for key, value in _values(b):
        if key not in left or left[key].shape != value.shape:
            result.only_in_b += 1
            continue
        met += 1
        difference = _difference(key, left[key], value.cpu())
        result.differences.append(difference)
        if not difference.relative_rms <= tolerance and result.first is None:
            result.first = difference
            result.agreed_before = result.differences[-2] if len(result.differences) > 1 else None
    result.only_in_a = len(left) - met
    if not met:
        raise ValueError("bisect: the two runs have no op in common; compare graphs of one model")
    return result


def _values(run: Run) -> Iterator[tuple[Key, Tensor]]:
    """Yield every contract's and matrix product's float results, and at last the logits."""
    seen: Counter[tuple[str, str]] = Counter()
    for node, value in interpret(run.module, run.given, run.semantics):
        if node.op == "output":
            yield ("", "logits", 0), value[0]
            return
        if is_weight(node) or not (contract_of(node.target) or node.target in _PRODUCTS):
            continue
        op = str(node.target).removeprefix("seamwise.").removesuffix(".default")
        results: Sequence[Any] = value if isinstance(value, (tuple, list)) else [value]
        for i, tensor in enumerate(t for t in results if isinstance(t, Tensor) and t.is_floating_point()):
            name = f"{op}[{i}]" if i else op
            yield (place(node), name, seen[place(node), name]), tensor
            seen[place(node), name] += 1


_PRODUCTS = {torch.ops.aten.linear.default, torch.ops.aten.mm.default, torch.ops.aten.embedding.default}


def _difference(key: Key, a: Tensor, b: Tensor) -> Difference:
    module, op, count = key
    named = f"{op} #{count + 1}" if count else op
    wide_a, wide_b = a.double(), b.double()
    apart = (wide_a - wide_b).abs()
    norm = float(wide_a.square().mean().sqrt()) or 1.0
    coarser = max((a.dtype, b.dtype), key=lambda d: torch.finfo(d).eps)
    return Difference(
        module=module, op=named, relative_rms=float(apart.square().mean().sqrt()) / norm, largest=float(apart.max()),
        ulps=ulp_histogram(wide_a, wide_b, coarser),
    )  # fmt: skip


def ulp_histogram(a: Tensor, b: Tensor, dtype: torch.dtype) -> dict[int, int]:
    """Count elements by their distance in units of the last place of `dtype` at the larger magnitude: buckets 0, 1, 2,
    4, 8, … by their lower bound. a and b are float64."""
    info = torch.finfo(dtype)
    magnitude = torch.maximum(a.abs(), b.abs()).clamp(min=info.smallest_normal)
    distance = ((a - b).abs() / (info.eps * torch.exp2(magnitude.log2().floor()))).round()
    powers = torch.exp2(distance.clamp(min=1).log2().floor())
    buckets = torch.where(distance < 1, 0.0, powers).nan_to_num(nan=2.0**62, posinf=2.0**62)
    values, counts = buckets.unique(return_counts=True)
    return {int(v): int(c) for v, c in zip(values, counts, strict=True)}


def as_text(result: Comparison) -> str:
    """Return the outcome for a terminal."""
    head = (
        f"{len(result.differences)} ops in both runs, {result.only_in_a} only in a, {result.only_in_b} only in b;"
        f" logits differ by {result.differences[-1].relative_rms:.2e} (relative RMS)"
    )
    first = result.first
    if first is None:
        return f"{head}\nno op differs by more than the tolerance"
    lines = [head, f"first op that differs: {first.op} in {first.module or 'the model'}"]
    lines.append(f"    relative RMS {first.relative_rms:.2e}, largest difference {first.largest:.2e}")
    if (before := result.agreed_before) is not None:
        lines.append(f"    the op before, {before.op} in {before.module}, differs by {before.relative_rms:.2e}")
    total = sum(first.ulps.values())
    for low, count in first.ulps.items():
        label = str(low) if low < 2 else f"{low}-{2 * low - 1}"
        lines.append(f"    {label:>12} ulp {count:9} {'#' * round(40 * count / total)}")
    return "\n".join(lines)
