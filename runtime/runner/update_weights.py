"""New values for the weights of a loaded program, in place: what a trainer sends between rollouts.

Every weight that a step reads follows from parameters by its recipe; the recipes of those given are evaluated again and
their results written where the old ones are, so that what was recorded and compiled stays. Weights that are made of
several parameters (q, k and v; experts that are stacked) wait until all of these are given, in any number of calls.
So has a module that guesses (runtime/speculation/further_tokens.py) what is its own of the checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from seamwise.compile.derive import Recipe, evaluate, parameters_of
from seamwise.compile.parameter import Parameter
from seamwise.compile.program import Executable
from seamwise.runtime.build.loading import readers_of
from seamwise.runtime.build.runner_config import RunnerConfig
from seamwise.runtime.weights.checkpoint import Checkpoint, Source, by_parameter
from seamwise.runtime.weights.experts import missing_experts
from seamwise.runtime.weights.files import StoredTensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_COPIES = ("embed_tokens.weight", "shared_head.head.weight")  # the model's, stored with a module that guesses
_MISFIT = "update_weights: these weights do not fit the model"


class _Weight(NamedTuple):
    """A weight of a program's step: its place there, its recipe, the parameters that this reads."""

    executable: Executable
    place: int
    recipe: Recipe
    reads: set[str]
    buffers: Mapping[str, Tensor]
    options: RunnerConfig

    def computed(self, source: Source) -> Tensor:
        return evaluate(self.recipe, *readers_of(source, self.buffers, self.options))

    def write(self, source: Source) -> None:
        self.executable.weights[self.place].copy_(self.computed(source))


class WeightUpdates:
    """The weights of one runner as they are now: which are whole, what waits, and the version that all are of.

    lost      names of the step's weights that hold no valid values: dropped, or half written when an update failed
    waiting   parameters given whose partners are not given yet: name -> a copy
    session   whether an update was started that is not finished: no step runs meanwhile
    version   of the weights: what finish was told, else the number of updates until now
    updates   how often weights were written
    """

    def __init__(self, executable: Executable, options: RunnerConfig, buffers: Mapping[str, Tensor]) -> None:
        self._weights: dict[str, _Weight] = {}
        self._parameters: dict[str, Parameter] = {}
        self._copies: set[str] = set()
        self.include(executable, options, buffers)
        self.lost: set[str] = set()
        self.waiting: dict[str, StoredTensor] = {}
        self.session = False
        self.version = "0"
        self.updates = 0

    def include(
        self, executable: Executable, options: RunnerConfig, buffers: Mapping[str, Tensor], label: str = ""
    ) -> None:
        """Let another program of the same checkpoint have its weights by the same calls, those apart that are here.

        label  that its weights' names begin with
        """
        program, held = executable.program, {id(w.executable.weights[w.place]) for w in self._weights.values()}
        for place, (name, recipe) in enumerate(program.recipes.items()):
            if id(executable.weights[place]) not in held:
                reads = parameters_of(recipe) - buffers.keys()
                self._weights[f"{label}{name}"] = _Weight(executable, place, recipe, reads, buffers, options)
        self._parameters = program.parameters | self._parameters
        modules = [n.removesuffix("eh_proj.weight") for n in program.parameters if n.endswith(".eh_proj.weight")]
        self._copies |= {f"{module}{name}" for module in modules for name in _COPIES}

    def start(self) -> None:
        """Begin an update of any number of calls. Raises RuntimeError where one was begun."""
        if self.session:
            raise RuntimeError("start_weight_update: an update is open already; call finish_weight_update first")
        self.session = True

    def finish(self, version: str | None = None) -> None:
        """End the update: all that was given is written. Raises RuntimeError, and stays open, while anything lacks."""
        if not self.session:
            raise RuntimeError("finish_weight_update: no update is open; call start_weight_update first")
        if problem := self._incomplete():
            raise RuntimeError(f"finish_weight_update: {problem}")
        self.session = False
        self.version = str(self.updates) if version is None else str(version)

    def problem(self) -> str | None:
        """Return why no step may run on these weights, naming what is to be given; None where they are whole."""
        if problem := self._incomplete():
            return problem
        return "a weight update is open; call finish_weight_update when all is given" if self.session else None

    def _incomplete(self) -> str | None:
        lacking = set().union(*(self._weights[name].reads for name in self.lost)) - self.waiting.keys()
        if lacking:
            shown = "\n  ".join(f"missing {name}" for name in sorted(lacking)[:20])
            more = f"\n  and {len(lacking) - 20} more" if len(lacking) > 20 else ""
            return (
                f"the weights are incomplete: {len(lacking)} have no valid value; give them to update_weights:\n"
                f"  {shown}{more}"
            )
        if not self.waiting:
            return None
        wanted = {name for _, missing in missing_experts(self.waiting, self._parameters) for name in missing}
        for weight in self._weights.values():
            wanted |= weight.reads - self.waiting.keys() if weight.reads & self.waiting.keys() else set()
        return (
            f"update_weights: {_some(self.waiting)} came without {_some(wanted)}, which the step reads joined with"
            " them; send these too"
        )

    @torch.inference_mode()
    def write(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Write new values of parameters, by the checkpoint's names, into the weights derived from them.

        Tensors may lie on any device, in any float dtype, and be views; a rank takes its part of whole ones. What is
        joined with parameters not given yet is copied and waits. Raises ValueError that lists all names that are
        unknown, or of another shape or dtype; nothing has changed then. After any other exception what was not written
        counts as lost.
        """
        given = self.waiting | self._stored(weights)
        stacks = missing_experts(given, self._parameters)
        parts = {name for names, missing in stacks if missing for name in names}
        source, found = self._fitting({n: t for n, t in given.items() if n not in parts}, part=True)
        touched = [name for name, weight in self._weights.items() if weight.reads & found.keys()]
        ready = [name for name in touched if self._weights[name].reads <= found.keys()]
        waits = set().union(*(self._weights[name].reads for name in {*touched} - {*ready})) & found.keys()
        held = {name: found[name] for name in waits} | {name: given[name] for name in parts}
        self.waiting = {name: t if t is self.waiting.get(name) else _copied(t) for name, t in held.items()}
        self.lost |= {*ready}  # until they are written
        for name in ready:
            self._weights[name].write(source)
            self.lost.discard(name)
        self.updates += 1
        if not self.session:
            self.version = str(self.updates)

    @torch.inference_mode()
    def restore_computed(self) -> None:
        """Write again what follows from computed tables alone: no update ever gives it."""
        for name in [name for name in self.lost if not self._weights[name].reads]:
            self._weights[name].write(Checkpoint({}, {}))
            self.lost.discard(name)

    @torch.inference_mode()
    def digest(self, weights: Iterable[tuple[str, Tensor]] | None = None) -> str:
        """Return 128 bits of the bytes of all the step's weights; or of what they would be with all these parameters.

        A trainer's and a runner's are equal where every weight arrived, whatever the layout it is kept in here.
        Raises ValueError where parameters are unknown, missing or do not fit; RuntimeError where the weights are lost.
        """
        if weights is None and self.lost:
            raise RuntimeError(f"weights_digest: {self._incomplete()}")
        own = (w for w in self._weights.values() if "adapter" not in w.recipe)
        if weights is None:
            made = (w.executable.weights[w.place] for w in own)
        else:
            source, _ = self._fitting(self._stored(weights))
            made = (w.computed(source) for w in own)
        digest = hashlib.blake2b(digest_size=16)
        for tensor in made:
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _stored(self, weights: Iterable[tuple[str, Tensor]]) -> dict[str, StoredTensor]:
        return {name: _stored(tensor) for name, tensor in weights if name not in self._copies}

    def _fitting(
        self, given: Mapping[str, StoredTensor], part: bool = False
    ) -> tuple[Checkpoint, Mapping[str, StoredTensor]]:
        """Return the source of what is given, and this by parameter. Raises ValueError; part: others may be missing."""
        found, problems = by_parameter(given, self._parameters)
        wanted = {n: p for n, p in self._parameters.items() if not part or n in found}
        source = Checkpoint.fitting(_MISFIT, found, wanted, _FLOATS, problems)
        return source, {n: t for n, t in found.items() if n in wanted}


def _some(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")


def _stored(tensor: Tensor) -> StoredTensor:
    kind = str(tensor.dtype).removeprefix("torch.")
    return StoredTensor(shape=tuple(tensor.shape), stored_dtype=kind, dtype=tensor.dtype, load=lambda: tensor.detach())


def _copied(stored: StoredTensor) -> StoredTensor:
    """Return the same in memory of our own: a trainer may write there again before the partners come."""
    return _stored(stored.load().clone())
