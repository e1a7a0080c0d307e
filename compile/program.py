"""A compiled model as data (Program), and ready to run on loaded weights (Executable)."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from seamwise.kernels.cpu import tape
from seamwise.passes import Report

from . import codegen
from .derive import Recipe
from .parameter import Parameter

Steps = list[tuple[Callable[..., Any], list[Callable[..., Any]]]]  # of each range of tokens: the step, and its pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRange:
    """Steps of `first` tokens up to the next range's first.

    function  of the program; calls: the function at each piece, in order
    turning  those of the functions that are written as generators too
    collectives  op, calls a step and bytes a row, of what ranks say to each other; said: a digest of it in its order
    """

    first: int
    function: str
    calls: list[str]
    collectives: list[dict[str, Any]]
    turning: list[str] = field(default_factory=list)
    said: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGroup:
    """Layers, by index, whose attention sees the last `window` tokens; 0: all. latent: they cache latents (MLA)."""

    window: int
    latent: bool
    layers: tuple[int, ...]


@dataclass(slots=True, kw_only=True)
class Program:
    """What compiling gives: text, numbers and Inductor's packages, so a pack can hold it.

    source     the generated module: one function for each distinct piece, and one for the steps of each range
    ranges     of numbers of tokens, from 1 on: several where a pass is for larger steps only
    num_seams  places where the graph is cut; num_seam_calls: ops that run there eagerly
    recipes    name of each weight the step reads -> how it follows from the checkpoint's parameters, in call order
    inputs     names of the step's inputs, in call order
    loose_ops  how many ops of each distinct piece have no kernel of ours; packages: those that Inductor compiled
    piece_costs   distinct piece -> tokens, bytes and flops of steps of some sizes
    weight_bytes, kv_bytes  of this rank's weights, and of the cache for a token
    kv_layers  of each layer of the KV cache, the shapes of its tensors in one block, of all ranks
    kv_groups  of layers that need the same of the past: those behind the first have inputs of their own, the last ones
    token_bytes, logit_bytes  of memory that a step's values take turns in, for each of its tokens and row of logits
    local_inputs  input -> (dimension, start, end) of each of which this rank has a part
    carried    name, dtype and shape of what a stage takes from the one before, its last inputs; None: as many as tokens
    parameters the model's parameters, by name
    """

    source: str
    ranges: list[TokenRange]
    num_seams: int
    num_seam_calls: int
    recipes: dict[str, Recipe]
    inputs: tuple[str, ...]
    carried: list[dict[str, Any]] = field(default_factory=list)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    reports: list[Report] = field(default_factory=list)
    providers: dict[str, int] = field(default_factory=dict)
    loose_ops: dict[str, int] = field(default_factory=dict)
    packages: dict[str, Path] = field(default_factory=dict)
    piece_costs: dict[str, list[dict[str, int]]] = field(default_factory=dict)
    weight_bytes: int = 0
    kv_bytes: int = 0
    kv_layers: list[list[list[int]]] = field(default_factory=list)
    kv_groups: list[CacheGroup] = field(default_factory=list)
    token_bytes: int = 0
    logit_bytes: int = 0
    local_inputs: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    @property
    def calls(self) -> list[str]:
        """The function at each piece of the smallest steps, in order."""
        return self.ranges[0].calls

    @property
    def collectives(self) -> list[dict[str, Any]]:
        return self.ranges[0].collectives

    @property
    def num_distinct(self) -> int:
        return len({name for each in self.ranges for name in each.calls})


class Executable:
    """A program bound to its weights."""

    def __init__(self, program: Program, weights: Sequence[Tensor]) -> None:
        self._packages: dict[str, Any] = {}
        if program.packages:
            from .inductor import load_piece

            self._packages = {name: load_piece(path) for name, path in program.packages.items()}
        self.program = program
        self.weights = list(weights)
        self._firsts = [each.first for each in program.ranges]
        functions = self._functions()
        self._steps = self._bound(functions)
        self._turns: Steps = [
            (
                functions.get(f"{each.function}_in_turns"),  # type: ignore[misc]
                [functions[f"{name}_in_turns" if name in each.turning else name] for name in each.calls],
            )
            for each in program.ranges
        ]
        self._tokens = program.inputs.index("token_ids")

    def _functions(self, around: codegen.Around | None = None) -> dict[str, Callable[..., Any]]:
        return codegen.load(self.program.source, around) | self._packages

    def _bound(self, functions: dict[str, Callable[..., Any]]) -> Steps:
        return [(functions[each.function], [functions[name] for name in each.calls]) for each in self.program.ranges]

    def around(self, wrap: codegen.Around) -> Callable[..., Any]:
        """Return what runs a step as a call does, on the same weights, with what `wrap` makes of each seam's provider
        in its place; see codegen.load."""
        steps = self._bound(self._functions(wrap))
        return lambda *inputs: _alone(self._start(steps, inputs))

    @property
    def takes_turns(self) -> bool:
        """Whether two batches may take turns: something is begun that is waited for later."""
        return all(step is not None for step, _ in self._turns)

    def in_turns(self, *inputs: Tensor) -> list[Any]:
        """Run a step of each of several batches, their inputs one behind the other; return all results.

        Each runs on until it begins what it will wait for, then the next. Every rank takes as many turns: which ops
        begin is the graph's, not the batch's. Of memory that batches share, they write their own slots of the caches; a
        later batch may read what an earlier one wrote in the same layer.
        """
        count = len(self.program.inputs)
        starts = range(0, len(inputs), count)
        results: list[Any] = [None] * len(starts)
        waiting = deque((i, self._start(self._turns, inputs[at : at + count])) for i, at in enumerate(starts))
        while waiting:
            i, batch = waiting.popleft()
            try:
                next(batch)
            except StopIteration as end:
                results[i] = _alone(end.value)
            else:
                waiting.append((i, batch))
        return results

    def _range(self, inputs: Sequence[Tensor]) -> int:
        tokens = inputs[self._tokens].shape[0]
        if tokens < self._firsts[0]:
            raise ValueError(f"a step of {tokens} tokens: the program is for {self._firsts[0]} or more")
        return bisect_right(self._firsts, tokens) - 1

    def __call__(self, *inputs: Tensor) -> Any:
        """Run one step on the flattened inputs, in the program's order; return the logits, or all the graph returns.

        Raises ValueError for a number of tokens in no range.
        """
        return _alone(self._start(self._steps, inputs))

    def _start(self, steps: Steps, inputs: Sequence[Tensor]) -> Any:
        """Return all that a step's function returns: results, or a generator of its turns."""
        step, pieces = steps[self._range(inputs)]
        if (recording := tape.current()) is not None:
            pieces = [partial(recording.piece, p) for p in pieces]
        return step(pieces, self.weights, *inputs)


def _alone(results: tuple[Any, ...]) -> Any:
    return results if len(results) > 1 else results[0]
