"""From a configuration to a compiled program: captured, then through the pipeline."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from seamwise.compile.derive import parameters_of
from seamwise.compile.program import Program
from seamwise.compile.startup_times import Ledger

from .capture_model import capture_model
from .drawn_steps import draw_steps
from .model_config import ModelConfig
from .runner_config import RunnerConfig


def compile_model(config: ModelConfig, options: RunnerConfig, ledger: Ledger) -> tuple[Program, dict[str, Tensor]]:
    """Capture a model and run the pipeline; return the program and the buffers that its weights read."""
    from seamwise.compile.check.validate import Validator
    from seamwise.compile.pipeline import compile_graph

    model = capture_model(config, options, ledger)
    pipeline, validator = options.pipeline, None
    if pipeline.parallel is not None and pipeline.parallel.plan is None:
        pipeline = replace(pipeline, parallel=replace(pipeline.parallel, plan=model.plan))
    if pipeline.validate:
        with ledger.stage("validate"):
            cases = draw_steps(config, model.kv_spec, adapters=pipeline.max_loras > 0)
            validator = Validator(model.captured, cases, model.buffers)
    program = compile_graph(model.captured, model.structure, pipeline, ledger, validator)
    program.parameters = model.parameters
    cached = (name.split("_") for name in program.inputs if name.startswith("kv_caches"))
    layers = sorted({int(name[2]) for name in cached})  # of this stage
    program.kv_layers = [[[*shape] for shape in model.kv_spec.layers[layer]] for layer in layers]
    program.kv_groups = list(model.kv_spec.groups)
    program.reports = [*model.reports, *program.reports]
    needed = {name for recipe in program.recipes.values() for name in parameters_of(recipe)}
    return program, {name: b for name, b in model.buffers.items() if name in needed}
