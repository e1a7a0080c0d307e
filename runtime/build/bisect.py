"""`seamwise bisect`: two runs of one checkpoint, each described by a few words, compared op by op."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from seamwise.compile.check.bisect import Comparison, Run, compare
from seamwise.compile.lower import choose_providers
from seamwise.compile.pipeline import PipelineConfig, rewrite
from seamwise.compile.startup_times import Ledger
from seamwise.passes.graph import value

from .capture_model import capture_model
from .drawn_steps import CASES, draw_steps
from .loading import open_checkpoint
from .model_config import ModelConfig
from .runner_config import RunnerConfig

_HELP = """A run is described by comma-separated words, all optional:
  entry=own|transformers         the model's definition (default own, where there is one)
  dtype=float32|bfloat16|…       (default float32)
  run=providers|meaning|reference  kernels as compiled; eager torch; eager torch in float64 (default providers)
  without=PASS                   leave a pass out (repeat for more); without=all leaves every pass out"""


def parse_run(text: str) -> dict[str, Any]:
    """Return a run's description as options. Raises ValueError naming a word that is not understood."""
    options: dict[str, Any] = {"entry": "auto", "dtype": "float32", "run": "providers", "without": []}
    for word in filter(None, text.split(",")):
        name, _, value = word.partition("=")
        if name not in options or not value:
            raise ValueError(f"bisect: {word!r} is not understood.\n{_HELP}")
        options[name] = [*options["without"], value] if name == "without" else value
    return options


def build_run(path: Path, config: ModelConfig, described: Mapping[str, Any], case: str) -> Run:
    """Capture, rewrite and lower a model as described; its placeholders read the checkpoint and the drawn case."""
    everything = [p for p in described["without"] if p != "all"]
    pipeline = PipelineConfig(disabled=tuple(everything))
    options = RunnerConfig.for_model(
        config, dtype=described["dtype"], entry=described["entry"], device="cpu", pipeline=pipeline, pack_dir=None
    )
    model = capture_model(config, options, Ledger())
    if "all" not in described["without"]:
        rewrite(model.captured, model.structure, pipeline, Ledger())
    choose_providers(model.captured.module)
    source = open_checkpoint(path, options, model.parameters)
    step = draw_steps(config, replace(model.kv_spec, dtype=torch.float32))[case]
    dtypes = {n.name: value(n).dtype for n in model.captured.graph.find_nodes(op="placeholder")}
    inputs = {name: x.to(dtypes[name]) for name, x in zip(model.captured.inputs, step, strict=True)}

    def given(node: Node) -> Tensor:
        if node.name in inputs:
            return inputs[node.name]
        name = model.captured.weights[node.name]
        return model.buffers[name] if name in model.buffers else source.read(name, dtype=options.dtype, device="cpu")

    return Run(module=model.captured.module, given=given, semantics=described["run"])


def bisect(path: Path, a: str, b: str, *, case: str, tolerance: float) -> Comparison:
    """Compare two described runs of the model in a directory on one drawn step, a name of CASES."""
    if case not in CASES:
        raise ValueError(f"bisect: no case {case!r}; there are: {', '.join(CASES)}")
    config = ModelConfig.from_directory(path)
    first, second = (build_run(path, config, parse_run(text), case) for text in (a, b))
    return compare(first, second, tolerance=tolerance)
