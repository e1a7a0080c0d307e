"""Runners of parts of a model that is loaded: what both compute alike of the checkpoint is one tensor for both."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from seamwise import caches
from seamwise.compile.derive import evaluate
from seamwise.compile.program import Executable, Program
from seamwise.compile.startup_times import Ledger
from seamwise.model_defs.deepseek_mtp import ARCHITECTURE
from seamwise.runtime.build.loading import load_step_weights
from seamwise.runtime.build.model_config import ModelConfig
from seamwise.runtime.build.packs import load_program
from seamwise.runtime.build.progress import shown_ledger
from seamwise.runtime.build.runner_config import RunnerConfig

from .runner import ModelRunner


def first_layers(whole: ModelRunner, num_layers: int) -> ModelRunner:
    """Return a runner of a model's first layers, its final norm and its head, none of whose weights is its own.

    Raises ValueError where there are no more layers than asked for, or weights would be there twice.
    """
    config = whole.config
    if not 1 <= num_layers < config.num_layers:
        raise ValueError(
            f"speculative_config: num_layers={num_layers}, wanted 1 to {config.num_layers - 1}: the model has"
            f" {config.num_layers}"
        )
    if whole.options.entry != "own":
        raise ValueError(
            f"speculative_config: method 'first_layers' needs Seamwise's definition of {config.architecture}, got"
            f" entry={whole.options.entry!r}"
        )
    raw = config.raw | {"num_hidden_layers": num_layers}
    if isinstance(kinds := raw.get("layer_types"), list):
        raw["layer_types"] = kinds[:num_layers]
    return sharing(whole, replace(config, num_layers=num_layers, raw=raw), num_speculative_tokens=0)


def further_layer(whole: ModelRunner, guesses: int) -> ModelRunner:
    """Return a runner of DeepSeek-V3's module for a further token, which reads the model's embedding and head.

    guesses  tokens in a row that it is asked for: steps of up to one more of each request are recorded
    Raises ValueError where the model has no such module.
    """
    config = whole.config
    if config.architecture != "DeepseekV3ForCausalLM" or not config.raw.get("num_nextn_predict_layers"):
        raise ValueError(
            f"speculative_config: method 'mtp' needs a DeepSeek-V3 checkpoint with num_nextn_predict_layers=1, got"
            f" {config.architecture} with {config.raw.get('num_nextn_predict_layers')}"
        )
    raw = config.raw | {"architectures": [ARCHITECTURE]}  # by which the pack is another than the model's
    return sharing(
        whole, replace(config, architecture=ARCHITECTURE, num_layers=1, raw=raw), whole.checkpoint,
        return_hidden_states=True, num_speculative_tokens=guesses, kv_cache_dtype=whole.options.dtype,
    )  # fmt: skip


def sharing(whole: ModelRunner, config: ModelConfig, checkpoint: Path | None = None, **changes: Any) -> ModelRunner:
    """Return a runner of a configuration, with the weights of `whole` wherever its recipe for one is the same.

    Others are its own, and are written where those of `whole` are updated.

    checkpoint  where the others are read; None: there must be none
    changes     of the options of `whole`
    """
    options = whole.options
    folder = caches.folder("packs") if options.pack_name else options.pack_dir  # a named pack's folder is the caller's
    changes = {"pack_name": None, "pack_dir": folder, "pipeline": replace(options.pipeline, max_loras=0)} | changes
    options = replace(options, **changes)
    with shown_ledger("start-up of what guesses") as ledger:
        return _loaded(whole, config, options, checkpoint, ledger)


def _loaded(
    whole: ModelRunner, config: ModelConfig, options: RunnerConfig, checkpoint: Path | None, ledger: Ledger
) -> ModelRunner:
    program, buffers = load_program(config, options, ledger)
    with ledger.stage("load weights"):
        given = _held_alike(whole, program)
        own = {name: recipe for name, recipe in program.recipes.items() if "state" in recipe}  # what a runner changes
        given |= {name: evaluate(recipe, given.__getitem__).to(options.device) for name, recipe in own.items()}
        missing = [name for name in program.recipes if name not in given]
        if checkpoint is not None:
            weights = load_step_weights(checkpoint, options, program, buffers, given)
        elif missing:
            raise ValueError(
                f"speculative_config: {len(missing)} weights would be in memory twice, as {missing[0]}: the model"
                " computes them otherwise; leave out enable_lora and what compiles it in its own way"
            )
        else:
            weights = [given[name] for name in program.recipes]
    part = ModelRunner(config, options, Executable(program, weights), ledger, buffers)
    whole.weights.include(part.executable, options, buffers, "of what guesses: ")
    return part


def _held_alike(whole: ModelRunner, program: Program) -> dict[str, Tensor]:
    recipes = zip(whole.program.recipes.values(), whole.executable.weights, strict=True)
    held = {json.dumps(recipe, sort_keys=True): weight for recipe, weight in recipes}
    keys = {name: json.dumps(recipe, sort_keys=True) for name, recipe in program.recipes.items()}
    return {name: held[key] for name, key in keys.items() if key in held}


def groups_of(whole: ModelRunner, part: ModelRunner) -> list[int]:
    """Return for each group of a part's KV layers the model's that has them. Raises ValueError where none has all."""
    found = []
    for mine in part.kv_spec.groups:
        having = [g for g, theirs in enumerate(whole.kv_spec.groups) if {*mine.layers} <= {*theirs.layers}]
        if not having:
            raise ValueError(
                f"speculative_config: layers {list(mine.layers)} are in several groups of the model's KV blocks; use"
                " disable_hybrid_kv_cache_manager=True, or another num_layers"
            )
        found.append(having[0])
    return found or [0]
