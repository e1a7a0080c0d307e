"""New values for the weights of a loaded program, in place: what a trainer sends between rollouts.

Every weight that a step reads follows from parameters by its recipe; the recipes of those given are evaluated again and
their results written where the old ones are, so that what was recorded and compiled stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from seamwise.compile.derive import evaluate, parameters_of
from seamwise.compile.program import Executable
from seamwise.runtime.build.loading import readers_of
from seamwise.runtime.build.runner_config import RunnerConfig
from seamwise.runtime.weights.checkpoint import Checkpoint, by_parameter
from seamwise.runtime.weights.files import StoredTensor


@torch.inference_mode()
def update_weights(
    executable: Executable, options: RunnerConfig, buffers: Mapping[str, Tensor], weights: Iterable[tuple[str, Tensor]]
) -> None:
    """Write new values of parameters, by the checkpoint's names, into the weights derived from them.

    Tensors may lie on any device, in any float dtype, and be views; a rank takes its part of whole ones. Weights that
    are joined (q, k and v) change together. Raises ValueError that lists all names that are unknown, missing beside
    those given, or of another shape or dtype; nothing has changed then.
    """
    program = executable.program
    given = {name: _stored(tensor) for name, tensor in weights}
    found, problems = by_parameter(given, program.parameters, program.tied)
    reads = {name: parameters_of(recipe) - buffers.keys() for name, recipe in program.recipes.items()}
    touched = [name for name, read in reads.items() if read & found.keys()]
    wanted = set().union(*(reads[name] for name in touched)) | (found.keys() & program.parameters.keys())
    kept = {n: getattr(torch, d) if d else None for n, d in program.kept_dtypes.items()}
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    source = Checkpoint.fitting(
        "update_weights: these weights do not fit the model", found,
        {n: s for n, s in program.parameters.items() if n in wanted}, kept, floats, problems,
    )  # fmt: skip

    readers = readers_of(source, buffers, options)
    places = dict(zip(program.recipes, executable.weights, strict=True))
    for name in touched:
        places[name].copy_(evaluate(program.recipes[name], *readers))


def _stored(tensor: Tensor) -> StoredTensor:
    kind = str(tensor.dtype).removeprefix("torch.")
    return StoredTensor(shape=tuple(tensor.shape), stored_dtype=kind, dtype=tensor.dtype, load=lambda: tensor.detach())
