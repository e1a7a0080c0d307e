"""Experts move between ranks while requests run: loads are counted, placements found, weights moved, at steps' ends.

Every rank calls `between_steps` before each step that all take together, and decides alike, from the sum of all ranks'
loads. At most one layer moves between two steps: its experts' weights and its table change there or not at all, so that
each step sees one placement. Weights are written where they are; what was compiled or recorded stays.
"""

from __future__ import annotations

import logging
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from seamwise.compile.derive import evaluate, parameters_of
from seamwise.compile.program import Executable, Program
from seamwise.kernels.moe.place_experts import table_of
from seamwise.passes.shard.balance_experts import LOADS, TABLE, first_places
from seamwise.runtime.build.runner_config import RunnerConfig

from .expert_placement import balancedness, gain_of, kept_in_place, moves_between, place_by_load

_LOG = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Layer:
    """A layer's experts: the indices of its table and of their weights among the step's; the expert at each place."""

    name: str
    table: int
    weights: list[int]
    places: list[int]
    row_bytes: int
    digests: list[int] = field(default_factory=list)  # of each expert's weights: what arrives is held against it


@dataclass(slots=True, kw_only=True)
class BalanceStats:
    """What was done until now: layers for which a move did not pay, layers and experts moved,
    and the balancedness that the last look found and predicted, layer by layer."""

    declined: int = 0
    layers: int = 0
    experts: int = 0
    found: list[float] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)


class Balancer:
    """The experts of one rank's program. Raises ValueError where a layer's weights do not lie expert by expert."""

    def __init__(self, executable: Executable, options: RunnerConfig, groups: int) -> None:
        assert options.eplb is not None and options.pipeline.parallel is not None
        self._executable, self._config, self._device = executable, options.eplb, options.device
        self._ranks, self._rank = options.num_ranks, options.pipeline.parallel.rank
        recipes = list(executable.program.recipes.values())
        (self._loads,) = (i for i, recipe in enumerate(recipes) if recipe.get("state") == LOADS)
        tables = {r["layer"]: (i, r) for i, r in enumerate(recipes) if r.get("state") == TABLE}
        self.layers = [self._layer(name, *tables[name], recipes) for name in recipes[self._loads]["layers"]]
        self._window = torch.zeros(
            (options.eplb.window_size, *executable.weights[self._loads].shape), dtype=torch.int32, device=self._device
        )
        self._groups, self._nodes, self._steps = groups, _nodes_of(self._ranks), 0
        self._pending: deque[tuple[Layer, list[int]]] = deque()
        self.stats, self.failure = BalanceStats(), ""
        self._check_by_expert(self.layers[0], options)  # the others are made alike

    def _layer(self, name: str, table: int, recipe: dict[str, Any], recipes: list[dict[str, Any]]) -> Layer:
        experts, width = len(recipe["values"]), len(recipe["values"][0])
        prefix = f"{name}.experts."
        own = [i for i, r in enumerate(recipes) if any(read.startswith(prefix) for read in parameters_of(r))]
        return Layer(
            name=name, table=table, weights=own, places=first_places(experts, width - 2), row_bytes=recipe["row_bytes"]
        )

    def _rows(self, layer: Layer) -> list[Tensor]:
        """Return each weight of a layer's experts as (places of this rank, bytes), over its memory."""
        share = len(layer.places) // self._ranks
        found = [self._executable.weights[i] for i in layer.weights]
        for weight in found:
            if not weight.is_contiguous() or weight.nbytes % share:
                raise ValueError(f"enable_eplb: {layer.name} has weights that do not lie expert by expert")
        return [weight.view(torch.uint8).view(share, -1) for weight in found]

    def _check_by_expert(self, layer: Layer, options: RunnerConfig) -> None:
        """Hold weights to what moving them takes, on drawn parameters: with every expert one place on, so are they."""
        share, program = len(layer.places) // self._ranks, self._executable.program
        for i, rows in zip(layer.weights, self._rows(layer), strict=True):
            recipe = list(program.recipes.values())[i]
            before, after = (
                evaluate(recipe, *_drawn(program, options.dtype, shift)).contiguous().view(torch.uint8).view(share, -1)
                for shift in (0, 1)
            )
            own = layer.places[self._rank * share : (self._rank + 1) * share]
            follows = [k for k in range(1, share) if own[k] == own[k - 1] + 1]
            if before.shape != rows.shape or any(not torch.equal(after[k - 1], before[k]) for k in follows):
                raise ValueError(
                    f"enable_eplb: {layer.name} has weights that do not lie expert by expert; leave it out"
                )

    def between_steps(self) -> None:
        """Account for the step before; look at the placements where it is time; move the next layer.

        Raises RuntimeError on every rank when a move fails on one, or when one is lost.
        """
        loads = self._executable.weights[self._loads]
        self._window[self._steps % len(self._window)] = loads
        loads.zero_()
        self._steps += 1
        try:
            if self._steps % self._config.step_interval == 0:
                self._look()
            if self._pending:
                self._move(*self._pending.popleft())
        except Exception as error:
            self.failure = f"enable_eplb: experts could not be moved, and no step may run: {error}"
            raise RuntimeError(self.failure) from error

    def _look(self) -> None:
        """Find placements by the loads of all ranks, and keep those that pay to be moved to."""
        total = self._window.sum(0, dtype=torch.int64)
        dist.all_reduce(total)
        steps, ranks = min(self._steps, len(self._window)), self._ranks
        self.stats.found, self.stats.predicted, self._pending = [], [], deque()
        for layer, loads_E in zip(self.layers, total.cpu().numpy().astype(np.float64), strict=True):
            if not layer.digests:
                layer.digests = self._digests(layer)
            nodes = self._nodes if self._groups % self._nodes == 0 else 1
            new = place_by_load(loads_E, len(layer.places), ranks=ranks, groups=self._groups, nodes=nodes)
            new = kept_in_place(new, layer.places, ranks)
            gain = gain_of(
                loads_E, layer.places, new, ranks, row_bytes=layer.row_bytes,
                expert_bytes=sum(rows.shape[1] for rows in self._rows(layer)), steps_seen=steps,
                steps_ahead=self._config.step_interval,
            )  # fmt: skip
            self.stats.found.append(balancedness(loads_E, layer.places, ranks))
            self.stats.predicted.append(balancedness(loads_E, new if gain.pays else layer.places, ranks))
            if gain.pays:
                self._pending.append((layer, new))
            elif new != layer.places:
                self.stats.declined += 1
        means = (float(np.mean(of)) for of in (self.stats.found, self.stats.predicted))
        told = "balancedness %.3f, predicted %.3f: %d layers are moved, %d would not pay"
        _LOG.info(told, *means, len(self._pending), self.stats.declined)

    def _digests(self, layer: Layer) -> list[int]:
        own = sum(rows.sum(1, dtype=torch.int64) for rows in self._rows(layer))
        assert isinstance(own, Tensor)
        every = own.new_empty(len(layer.places))
        dist.all_gather(list(every.chunk(self._ranks)), own)
        return [int(every[layer.places.index(expert)]) for expert in range(max(layer.places) + 1)]

    def _move(self, layer: Layer, new: list[int]) -> None:
        """Give every rank the experts of its places: sent aside first, then, if all is there on all ranks, written."""
        share = len(new) // self._ranks
        with self._all_or_none(layer):
            rows, moves = self._rows(layer), moves_between(layer.places, new, self._ranks)
            going = [m for m in moves if m.source // share == self._rank]
            coming = sorted((m for m in moves if m.place // share == self._rank), key=lambda m: m.source // share)
            taken = [torch.cat([each[m.source % share] for each in rows]) for m in going]
            sent = torch.stack(taken) if taken else rows[0].new_empty(0, sum(each.shape[1] for each in rows))
            arrived = sent.new_empty(len(coming), sent.shape[1])
            come = [sum(m.source // share == r for m in coming) for r in range(self._ranks)]
            go = [sum(m.place // share == r for m in going) for r in range(self._ranks)]
        dist.all_to_all_single(arrived, sent, come, go)
        with self._all_or_none(layer):
            for move, row in zip(coming, arrived, strict=True):
                if int(row.sum(dtype=torch.int64)) != layer.digests[new[move.place]]:
                    raise RuntimeError(f"place {move.place} was sent other weights than expert {new[move.place]}'s")
        for move, row in zip(coming, arrived, strict=True):
            for each, part in zip(rows, row.split([each.shape[1] for each in rows]), strict=True):
                each[move.place % share] = part
        table = self._executable.weights[layer.table]
        table.copy_(torch.tensor(table_of(new, *table.shape), dtype=table.dtype))
        layer.places = new
        self.stats.layers += 1
        self.stats.experts += len(moves)

    @contextmanager
    def _all_or_none(self, layer: Layer) -> Iterator[None]:
        """Let all ranks go on where none raised; else all raise."""
        problem = ""
        try:
            yield
        except Exception as error:
            problem = f"{layer.name}, rank {self._rank}: {type(error).__name__}: {error}"
        told: list[str | None] = [None] * self._ranks
        dist.all_gather_object(told, problem)
        if found := [one for one in told if one]:
            raise RuntimeError("; ".join(found))


def _drawn(program: Program, dtype: torch.dtype, shift: int) -> tuple[Any, Any]:
    """Return what reads drawn parameters, whole and in part: expert e's are those that shift draws for e + shift."""

    def part(name: str, dim: int, start: int, end: int) -> Tensor:
        _, *shape = program.parameters[name].shape
        assert dim in (0, -1 - len(shape)), f"{name} is shared out along dimension {dim}"
        made = []
        for expert in range(start, end):
            draw = torch.Generator().manual_seed(expert + shift + 1)
            made.append(torch.randint(97, 122, (*shape,), generator=draw, dtype=torch.uint8))
        return torch.stack(made).to(program.parameters[name].own_dtype or dtype)

    return lambda name: part(name, 0, 0, program.parameters[name].shape[0]), part


def _nodes_of(ranks: int) -> int:
    """Return how many machines the ranks are on, 1 where they are not on each alike, one after the other."""
    hosts: list[str] = [""] * ranks
    dist.all_gather_object(hosts, socket.gethostname())
    each = list(dict.fromkeys(hosts))
    alike = ranks % len(each) == 0 and hosts == [host for host in each for _ in range(ranks // len(each))]
    return len(each) if alike else 1
