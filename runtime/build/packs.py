"""A model's pack: found by its key, written by `seamwise compile`, loaded in place of the model's directory."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seamwise.compile import pack
from seamwise.compile.ledger import Ledger
from seamwise.compile.pipeline import PipelineConfig
from seamwise.compile.program import Program
from seamwise.kernels.cpu.tape import compile_ahead

from .loading import compile_model
from .model_config import ModelConfig
from .runner_config import RunnerConfig


def load_program(config: ModelConfig, options: RunnerConfig, ledger: Ledger) -> tuple[Program, dict[str, Tensor]]:
    """Return the compiled program and the model's buffers: from the pack when there is one, else compiled and packed.

    A damaged pack is reported as a warning and replaced; a folder where none can be kept is one too.
    """
    if torch.device(options.device).type == "cpu":
        compile_ahead()
    with ledger.stage("look up pack"):
        parts = pack_parts(config, options)
        try:
            found = pack.load(options.pack_dir, parts, options.pack_name) if options.pack_dir else None
        except pack.PackRefused as error:
            if options.offline:
                raise
            warnings.warn(f"{error}; compiling again", stacklevel=2)
            found = None
    if found is not None:
        return found
    if options.offline:
        raise ValueError(
            f"offline=True: {options.pack_dir} has no pack {options.pack_name or pack.key_of(parts)} for this model and"
            " these options; make one with `seamwise compile --model DIR -o PACK`"
        )
    program, buffers = compile_model(config, options, ledger)
    if options.pack_dir:
        with ledger.stage("write pack"):
            try:
                pack.save(options.pack_dir, parts, program, buffers, name=options.pack_name)
            except OSError as error:  # a full disk, a folder that may not be written
                warnings.warn(
                    f"{options.pack_dir}: the compiled model cannot be kept there ({error}), and the next start"
                    " compiles again; give pack_dir another folder, or None",
                    stacklevel=2,
                )
    return program, buffers


def pack_parts(config: ModelConfig, options: RunnerConfig) -> dict[str, str]:
    """Return what a model's pack depends on."""
    from seamwise.model_defs.rope import table_length

    return pack.key_parts(
        {
            "model": config.raw,
            "dtype": options.dtype,
            "kv_cache_dtype": "dtype" if options.kv_cache_dtype == options.dtype else options.kv_cache_dtype,
            "stored": options.stored and asdict(options.stored),
            "device": torch.device(options.device).type,
            "entry": options.entry,
            "block_size": options.block_size,
            "hidden_states": options.return_hidden_states,
            "table_length": table_length(config.raw, options.max_model_len),
            "pipeline": asdict(options.pipeline),
        }
    )


def write_pack(model: Path, target: Path, ledger: Ledger, **options: Any) -> Program:
    """Compile the model in a directory into the pack `target`, which ModelRunner.load then takes in its place.

    Raises ValueError when `target` exists and is no pack, or cannot be written.
    """
    if target.exists() and not pack.is_pack(target):
        raise ValueError(f"{target} exists and is no pack; choose another path")
    config = ModelConfig.from_directory(model)
    settings = RunnerConfig.for_model(config, **options, pack_dir=target.parent, pack_name=target.name)
    if torch.device(settings.device).type == "cpu":
        compile_ahead()  # the pack's kernels, so that a start from it compiles nothing
    program, buffers = compile_model(config, settings, ledger)
    chosen: dict[str, Any] = {"dtype": str(settings.dtype).removeprefix("torch."), "device": settings.device}
    chosen["entry"] = settings.entry
    chosen |= {name: options[name] for name in ("quantization", "kv_cache_dtype") if name in options}
    chosen["return_hidden_states"] = settings.return_hidden_states
    chosen |= {"block_size": settings.block_size, "pipeline": asdict(settings.pipeline)}
    load_with = {"checkpoint": str(model.resolve()), "options": chosen}
    with ledger.stage("write pack"):
        parts = pack_parts(config, settings)
        try:
            pack.save(target.parent, parts, program, buffers, name=target.name, load_with=load_with)
        except OSError as error:
            raise ValueError(f"{target}: cannot be written: {error}; choose another path") from error
    return program


def open_pack(target: Path, options: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint and the options that load the pack `target`; options given here come first.

    Raises ValueError for a pack that does not say what it was made from.
    """
    made = pack.manifest_of(target)["load_with"]
    if not made:
        raise ValueError(f"{target} does not name its checkpoint; load the model's directory instead")
    recorded = made["options"] | {"pipeline": PipelineConfig(**_tuples(made["options"]["pipeline"]))}
    return Path(made["checkpoint"]), recorded | {"pack_dir": target.parent, "pack_name": target.name} | options


def _tuples(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
