"""One trace of a model for all tests of a file that compile it with other weights, passes or ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from seamwise.compile.capture import Captured
from seamwise.compile.pipeline import PipelineConfig
from seamwise.runtime.build import capture_model as build
from seamwise.runtime.build import compile_model
from seamwise.runtime.build.model_config import ModelConfig
from seamwise.runtime.build.runner_config import RunnerConfig


def sharing_traces() -> Any:
    """Return a fixture of a module whose tests share traces."""

    @pytest.fixture(autouse=True, scope="module")
    def traces() -> Iterator[None]:
        with shared_traces():
            yield

    return traces


@contextmanager
def shared_traces() -> Iterator[None]:
    """Let models of equal configuration, traced with equal options, be copies of one trace.

    All that follows a trace is done for each. Not for tests of tracing or of models, nor where one patches a model.
    """
    known: dict[str, Captured] = {}
    capture_model, captured = build.capture_model, build._captured
    asked = ""

    def of(config: ModelConfig, options: RunnerConfig, *given: Any) -> Any:
        nonlocal asked
        raw = {name: value for name, value in config.raw.items() if name != "quantization_config"}
        alike = replace(options, stored=None, pipeline=PipelineConfig(), pack_dir=None)
        asked = f"{config.architecture} {json.dumps(raw, sort_keys=True)} {alike}"
        try:
            return capture_model(config, options, *given)
        finally:
            asked = ""

    def once(model: Any, arguments: Any, spec: Any) -> Captured:
        if not asked:  # by another way than compile_model
            return captured(model, arguments, spec)
        key = f"{asked} {spec}"
        if key not in known:
            known[key] = captured(model, arguments, spec)
        return known[key].copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_captured", once)
        patch.setattr(compile_model, "capture_model", of)
        yield
