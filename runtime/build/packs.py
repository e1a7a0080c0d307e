"""A model's pack: found by its key, written by `seamwise compile`, loaded in place of the model's directory."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seamwise import caches
from seamwise.compile import pack
from seamwise.compile.pipeline import PipelineConfig
from seamwise.compile.program import Program
from seamwise.compile.startup_times import Ledger
from seamwise.kernels.cpu.cores import limit_threads
from seamwise.kernels.cpu.tape import compile_ahead

from .compile_model import compile_model
from .model_config import ModelConfig
from .runner_config import RunnerConfig

_REMEDY = "make it again with `seamwise compile --model DIR -o PACK`"
_RECORDED = (
    "quantization", "kv_cache_dtype", "max_model_len", "load_format", "runner", "convert", "pooler_config",
    "hf_overrides",
)  # fmt: skip
_UNSAID = ("auto", None)


def load_program(config: ModelConfig, options: RunnerConfig, ledger: Ledger) -> tuple[Program, dict[str, Tensor]]:
    """Return the compiled program and the model's buffers: from the pack when there is one, else compiled and packed.

    A damaged pack is reported as a warning and replaced; a folder where none can be kept is one too. A pack that is
    named is used or refused, and never written.
    """
    if torch.device(options.device).type == "cpu":
        limit_threads()
        compile_ahead()
    folder = options.pack_dir
    with ledger.stage("look up pack"):
        parts = pack_parts(config, options)
        try:
            found = pack.load(folder, parts, options.pack_name) if folder else None
        except pack.PackRefused as error:
            if options.pack_name:
                raise pack.PackRefused(f"{error}; {_REMEDY}") from error
            if options.offline:
                raise
            warnings.warn(f"{error}; compiling again", stacklevel=2)
            found = None
    if found is not None:
        return found
    if options.offline or options.pack_name:
        asked = "pack_name" if options.pack_name else "offline=True"
        raise ValueError(
            f"{asked}: {folder} has no pack {options.pack_name or pack.key_of(parts)} for this model and these options;"
            f" {_REMEDY}"
        )
    program, buffers = compile_model(config, options, ledger)
    if folder:
        with ledger.stage("write pack"):
            try:
                pack.save(folder, parts, program, buffers)
            except OSError as error:  # a full disk, a folder that may not be written or that others can write
                warnings.warn(
                    f"{folder}: the compiled model cannot be kept there ({error}), and the next start compiles again;"
                    " give pack_dir another folder, or None",
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
            "pools": options.pooler is not None,
            "one_kv_group": options.disable_hybrid_kv_cache_manager,
            "table_length": table_length(config.raw, options.max_model_len),
            "pipeline": asdict(options.pipeline),
        },
        device=options.device,
        entry=options.entry,
    )


def write_pack(model: Path, target: Path, ledger: Ledger, **options: Any) -> Program:
    """Compile the model in a directory into the pack `target`, which ModelRunner.load then takes in its place.

    Raises ValueError when `target` exists and is no pack, or cannot be written.
    """
    if target.exists() and not pack.is_pack(target):
        raise ValueError(f"{target} exists and is no pack; choose another path")
    model = model_of(model)
    config = ModelConfig.from_directory(model, options.get("hf_overrides"))
    settings = RunnerConfig.for_model(config, **options, pack_dir=target.parent, pack_name=target.name)
    if torch.device(settings.device).type == "cpu":
        compile_ahead()  # the pack's kernels, so that a start from it compiles nothing
    program, buffers = compile_model(config, settings, ledger)
    recorded = {name: options[name] for name in _RECORDED if options.get(name) not in _UNSAID}
    recorded |= {"dtype": str(settings.dtype).removeprefix("torch."), "device": settings.device}
    recorded |= {"entry": settings.entry, "block_size": settings.block_size, "pipeline": asdict(settings.pipeline)}
    recorded["return_hidden_states"] = settings.return_hidden_states
    recorded["disable_hybrid_kv_cache_manager"] = settings.disable_hybrid_kv_cache_manager
    load_with = {"checkpoint": str(model.resolve()), "options": recorded}
    with ledger.stage("write pack"):
        parts = pack_parts(config, settings)
        try:
            pack.save(target.parent, parts, program, buffers, name=target.name, load_with=load_with)
        except OSError as error:
            raise ValueError(f"{target}: cannot be written: {error}; choose another path") from error
    try:
        pack.remember(target)
    except OSError as error:
        warnings.warn(f"{target} is whole, but that it was made here cannot be noted: {error}", stacklevel=2)
    return program


def model_of(path: Path) -> Path:
    """Return the checkpoint that a pack of `seamwise compile` was made from; of a model, the model itself.

    Raises ValueError for a pack that was not made here: taken for a model, it would run code of unknown origin.
    """
    return open_pack(path, {})[0] if pack.is_pack(path) else path


def open_pack(target: Path, options: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint and the options that load the pack `target`; of options given here, those that say "auto"
    leave what the pack was made with.

    Raises ValueError for a pack that was not made here, that names no checkpoint, or one that is gone.
    """
    if not pack.made_here(target):
        raise ValueError(
            f"{target} is a pack that was not made here, and a pack is code: pass the model's directory, with"
            f" pack_dir={str(target.parent)!r} and pack_name={target.name!r}, to run it"
        )
    for name in ("pack_dir", "pack_name"):
        if name in options:
            raise ValueError(f"{name}={options[name]!r}: {target} is a pack itself; leave it out")
    given = {name: value for name, value in options.items() if value not in _UNSAID}
    checkpoint, recorded = _recorded(target)
    if not checkpoint.exists():
        raise ValueError(
            f"{target} was made from {checkpoint}, which is not there; pass the model's directory, with"
            f" pack_dir={str(target.parent)!r} and pack_name={target.name!r}"
        )
    return checkpoint, recorded | given | {"pack_dir": target.parent, "pack_name": target.name}


def with_recorded(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a model whose pack is named beside it; those not said are as the pack was made."""
    folder = options.get("pack_dir", caches.folder("packs"))
    if folder is None or not pack.is_pack(target := Path(folder) / options["pack_name"]):
        return options
    given = {name: value for name, value in options.items() if value not in _UNSAID}
    return _recorded(target)[1] | given


def _recorded(target: Path) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint that a pack was made from and the options it was made with."""
    made = pack.manifest_of(target)["load_with"]
    try:
        pipeline = PipelineConfig(**_tuples(made["options"]["pipeline"]))
        return Path(made["checkpoint"]), {**made["options"], "pipeline": pipeline}
    except (KeyError, TypeError, AttributeError) as error:
        raise pack.PackRefused(f"{target} does not say what it was made from; {_REMEDY}") from error


def _tuples(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
