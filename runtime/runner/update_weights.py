"""New values for the weights of a loaded program, in place: what a trainer sends between rollouts.

Every weight that a step reads follows from parameters by its recipe; the recipes of those given are evaluated again and
their results written where the old ones are, so that what was recorded and compiled stays. Trainers send one tensor at
a time: what is joined with others (q, k and v; experts that are stacked) waits until all of them have come.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from seamwise.compile.derive import evaluate, parameters_of
from seamwise.compile.program import Executable, Program
from seamwise.runtime.build.loading import readers_of
from seamwise.runtime.build.runner_config import RunnerConfig
from seamwise.runtime.weights.checkpoint import Checkpoint, by_parameter
from seamwise.runtime.weights.experts import missing_experts
from seamwise.runtime.weights.files import StoredTensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(slots=True)
class WeightUpdates:
    """Updates of one program's weights.

    waiting  copies of tensors that have come before all that they are joined with, by name
    """

    waiting: dict[str, Tensor] = field(default_factory=dict)

    @torch.inference_mode()
    def update(
        self, executable: Executable, options: RunnerConfig, buffers: Mapping[str, Tensor],
        weights: Iterable[tuple[str, Tensor]],
    ) -> None:  # fmt: skip
        """Write new values of parameters, by the checkpoint's names, into the weights derived from them.

        Tensors may lie on any device, in any float dtype, and be views; a rank takes its part of whole ones. Weights
        that are joined change together, once the last of them has come. Raises ValueError that lists all names that
        are unknown, and those of another shape or dtype; nothing has changed then.
        """
        program = executable.program
        given = {name: _stored(tensor) for name, tensor in {**self.waiting, **dict(weights)}.items()}
        parts = {name for names, missing in missing_experts(given, program.parameters) if missing for name in names}
        found, problems = by_parameter(
            {name: tensor for name, tensor in given.items() if name not in parts}, program.parameters, program.tied
        )
        source = Checkpoint.fitting(
            "update_weights: these weights do not fit the model", found,
            {n: s for n, s in program.parameters.items() if n in found},
            {n: getattr(torch, d) if d else None for n, d in program.kept_dtypes.items()}, _FLOATS, problems,
        )  # fmt: skip
        reads = {name: parameters_of(recipe) - buffers.keys() for name, recipe in program.recipes.items()}
        readers = readers_of(source, buffers, options)
        places = dict(zip(program.recipes, executable.weights, strict=True))
        unfinished: set[str] = set()
        for name, read in reads.items():
            if read and read <= found.keys():
                places[name].copy_(evaluate(program.recipes[name], *readers))
            else:
                unfinished |= read & found.keys()
        kept = {name: given[name] for name in parts} | {name: found[name] for name in unfinished}
        self.waiting = {n: self.waiting[n] if n in self.waiting else t.load().clone() for n, t in kept.items()}

    def unfinished(self, program: Program) -> str | None:
        """Return what has come without what it is joined with, in words; None when nothing waits."""
        if not self.waiting:
            return None
        given = {name: _stored(tensor) for name, tensor in self.waiting.items()}
        wanted = {name for _, missing in missing_experts(given, program.parameters) for name in missing}
        for recipe in program.recipes.values():
            read = parameters_of(recipe) & program.parameters.keys()
            wanted |= read - self.waiting.keys() if read & self.waiting.keys() else set()
        return (
            f"update_weights: {_some(self.waiting)} came without {_some(wanted)}, which the step reads joined with"
            " them; send these too"
        )


def _some(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")


def _stored(tensor: Tensor) -> StoredTensor:
    kind = str(tensor.dtype).removeprefix("torch.")
    return StoredTensor(shape=tuple(tensor.shape), stored_dtype=kind, dtype=tensor.dtype, load=lambda: tensor.detach())
