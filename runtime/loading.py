"""From a configuration to a compiled program, and from a checkpoint to the weights it reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from seamwise.compile.derive import evaluate, parameters_of
from seamwise.compile.ledger import Ledger
from seamwise.compile.program import Program

from .checkpoint import open_source, parameter_shapes, show_progress
from .config import ModelConfig
from .drawn_steps import draw_steps
from .runner_config import RunnerConfig
from .step import STEP_ARGUMENTS

if TYPE_CHECKING:
    from seamwise.compile.capture import Captured
    from seamwise.passes import Structure


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedModel:
    """A traced model: its graph, what its structure promises, its buffers, its parameters' shapes and tied names."""

    captured: Captured
    structure: Structure
    buffers: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    tied: dict[str, str]


def capture_model(config: ModelConfig, options: RunnerConfig, ledger: Ledger) -> CapturedModel:
    """Build the module without weights and trace it on fake tensors."""
    with ledger.stage("import compiler"):
        from torch._subclasses import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        from seamwise.compile.capture import capture
        from seamwise.compile.structure import structure_of
        from seamwise.model_defs import build_model
    with ledger.stage("build model"):
        model = build_model(config.architecture, config.raw, entry=options.entry, max_model_len=options.max_model_len)
        buffers = {name: b for name, b in model.named_buffers() if b.device.type != "meta"}
        structure = structure_of(model)
        fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        with fake:
            _make_fake(model, options)
    with ledger.stage("capture"):
        with fake:
            arguments = _example_arguments(config, options)
        captured = capture(model, arguments, _dims(config))
    shapes, tied = parameter_shapes(model)
    return CapturedModel(captured=captured, structure=structure, buffers=buffers, shapes=shapes, tied=tied)


def compile_model(config: ModelConfig, options: RunnerConfig, ledger: Ledger) -> tuple[Program, dict[str, Tensor]]:
    """Capture a model and run the pipeline; return the program and the buffers that its weights read."""
    from seamwise.compile.pipeline import compile_graph
    from seamwise.compile.validate import Validator

    model = capture_model(config, options, ledger)
    validator = None
    if options.pipeline.validate:
        with ledger.stage("validate"):
            cases = draw_steps(config, block_size=options.block_size, dtype=options.dtype)
            validator = Validator(model.captured, cases, model.buffers)
    program = compile_graph(model.captured, model.structure, options.pipeline, ledger, validator)
    program.parameters, program.tied = {name: list(shape) for name, shape in model.shapes.items()}, model.tied
    needed = {name for recipe in program.recipes.values() for name in parameters_of(recipe)}
    return program, {name: b for name, b in model.buffers.items() if name in needed}


def load_step_weights(path: Path, options: RunnerConfig, program: Program, buffers: dict[str, Tensor]) -> list[Tensor]:
    """Evaluate every recipe of the program over the checkpoint, one at a time: memory is the model plus one recipe."""
    shapes = {name: tuple(shape) for name, shape in program.parameters.items()}
    source = open_source(
        path, shapes, program.tied, dtype=options.dtype, device=options.device, load_format=options.load_format,
        seed=options.seed,
    )  # fmt: skip

    def parameter(name: str) -> Tensor:
        if name in buffers:
            return buffers[name].to(options.device)
        return source.read(name, dtype=options.dtype, device=options.device)

    with torch.inference_mode():
        names = show_progress(program.recipes, "loading weights")
        return [evaluate(program.recipes[name], parameter) for name in names]


def _make_fake(model: nn.Module, options: RunnerConfig) -> None:
    """Give parameters fake tensors of the runner's dtype and device, tied ones the same, and buffers fake ones too."""
    fakes: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if id(p) not in fakes:
                fake = torch.empty(p.shape, dtype=options.dtype, device=options.device)
                fakes[id(p)] = nn.Parameter(fake, requires_grad=False)
            setattr(module, name, fakes[id(p)])
        for name, b in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(b.shape, dtype=b.dtype, device=options.device))


def _example_arguments(config: ModelConfig, options: RunnerConfig) -> dict[str, object]:
    tokens, requests, blocks = 7, 3, 5
    cache = (blocks, config.num_kv_heads, options.block_size, config.head_dim)

    def make(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=options.device)

    values: dict[str, object] = {
        "token_ids": make((tokens,), torch.int64),
        "positions": make((tokens,), torch.int64),
        "kv_caches": [[make(cache, options.dtype), make(cache, options.dtype)] for _ in range(config.num_layers)],
        "slot_mapping": make((tokens,), torch.int64),
        "block_table": make((requests, 4), torch.int32),
        "seq_lens": make((requests,), torch.int32),
        "query_starts": make((requests + 1,), torch.int32),
        "logit_rows": make((2,), torch.int64),
    }
    return {name: values[name] for name in STEP_ARGUMENTS}


def _dims(config: ModelConfig) -> dict[str, Any]:
    return {
        "token_ids": ("T",),
        "positions": ("T",),
        "kv_caches": [[("N", None, None, None)] * 2 for _ in range(config.num_layers)],
        "slot_mapping": ("T",),
        "block_table": ("R", "B"),
        "seq_lens": ("R",),
        "query_starts": ("S",),
        "logit_rows": ("L",),
    }
