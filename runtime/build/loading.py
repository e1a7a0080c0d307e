"""From a checkpoint to the weights that a program reads: one recipe after the other."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from seamwise.compile.derive import evaluate, parameters_of
from seamwise.compile.parameter import Parameter
from seamwise.compile.program import Program
from seamwise.runtime.weights.checkpoint import Convert, Source, open_source, show_progress
from seamwise.runtime.weights.files import StoredTensor
from seamwise.runtime.weights.foreign import as_transformers_reads

from .hidden_states import without_head
from .model_config import ModelConfig
from .runner_config import RunnerConfig

_TRIM_BYTES = 32 << 20  # of weights read between two returns of freed memory


def load_step_weights(
    path: Path, options: RunnerConfig, program: Program, buffers: dict[str, Tensor],
    given: Mapping[str, Tensor] | None = None,
) -> list[Tensor]:  # fmt: skip
    """Evaluate every recipe of the program over the checkpoint, one at a time: memory is the model plus one recipe.

    given  weights, by their recipes' names, that are there already
    """
    parameters = program.parameters
    readers = readers_of(open_checkpoint(path, options, parameters), buffers, options)
    weights: dict[str, Tensor] = {**(given or {})}
    freed_bytes = 0  # about as much is freed as is kept

    def size(name: str) -> int:
        return sum(math.prod(parameters[n].shape) for n in parameters_of(program.recipes[name]) if n in parameters)

    with torch.inference_mode():  # the largest first: what is read and then freed comes beside little else
        missing = program.recipes.keys() - weights.keys()
        for name in show_progress(sorted(missing, key=size, reverse=True), "loading weights"):
            weights[name] = evaluate(program.recipes[name], *readers).to(options.device)
            freed_bytes += weights[name].nbytes
            if freed_bytes > _TRIM_BYTES:
                freed_bytes = 0
                _return_freed_memory()
    _return_freed_memory()
    return [weights[name] for name in program.recipes]


def open_checkpoint(path: Path, options: RunnerConfig, parameters: Mapping[str, Parameter]) -> Source:
    """Open what gives a model with these parameters and options its weights; see open_source."""
    return open_source(
        path, parameters, dtype=options.dtype, device=options.device, load_format=options.load_format,
        seed=options.seed, ranks=options.num_ranks, convert=_converting(path, options, parameters),
        read=_reading(options, parameters),
    )  # fmt: skip


def _reading(options: RunnerConfig, parameters: Mapping[str, Parameter]) -> Convert | None:
    """Return what reads a checkpoint's own quantized layout as the one that layers read, and what pools without a head;
    None where it is that."""
    published = None if options.stored is None else options.stored.published
    read = None if published is None else partial(published.read, parameters=parameters, dtype=options.dtype)
    if options.pooler is None:
        return read
    return without_head if read is None else lambda found: read(without_head(found))


def _converting(path: Path, options: RunnerConfig, parameters: Mapping[str, Parameter]) -> Convert | None:
    """Return what fits a published checkpoint's tensors to a transformers class; our own definitions need nothing."""
    if options.entry != "transformers":
        return None

    def convert(found: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
        config = ModelConfig.from_directory(path, options.hf_overrides)
        return as_transformers_reads(found, parameters, config.architecture, config.raw)

    return convert


def _return_freed_memory() -> None:
    """Give the system back what glibc keeps between what is in use: 96 MiB after loading SmolLM2-135M's 257."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def readers_of(
    source: Source, buffers: Mapping[str, Tensor], options: RunnerConfig
) -> tuple[Callable[[str], Tensor], Callable[[str, int, int, int], Tensor]]:
    """Return what `evaluate` reads with: a parameter or buffer by name, whole, and a range of one."""

    def parameter(name: str) -> Tensor:
        if name in buffers:
            return buffers[name].to(options.device)
        return source.read(name, dtype=options.dtype, device=options.device)

    def part(name: str, dim: int, start: int, end: int) -> Tensor:
        if name in buffers:
            return buffers[name].narrow(dim, start, end - start).to(options.device)
        return source.read(name, dtype=options.dtype, device=options.device, part=(dim, start, end))

    return parameter, part
