"""A pack: a directory that holds a compiled model, so that a warm start neither traces nor compiles.

    manifest.json      format, key with its parts, program (calls, recipes, inputs, reports), sha256 of every file
    program.py         the generated code
    piece_*.pt2        pieces that Inductor compiled (zip archives of a shared object, its source and JSON)
    buffers.safetensors  buffers of the model that no checkpoint holds (RoPE frequencies)

Everything is text or plain tensors: nothing is ever unpickled. The key covers all that the program is computed from:
the model's configuration, every source file of Seamwise's compiler and kernels, and the toolchain. It cannot be the
traced graph itself, which a warm start does not have.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seamwise.passes import Miss, Report

from .plugins import digests
from .program import Program, TokenRange

FORMAT = 3
DEFAULT_DIRECTORY = Path.home() / ".cache" / "seamwise" / "packs"


class PackRefused(ValueError):
    """A pack cannot be used: truncated, tampered with, or made for something else."""


def key_parts(configuration: Mapping[str, Any]) -> dict[str, str]:
    """Return what a pack depends on, each part by name: the caller's configuration, our sources, the toolchain."""
    parts = {f"config.{k}": json.dumps(v, sort_keys=True, default=str) for k, v in sorted(configuration.items())}
    for folder in (Path(__file__).parent, *(_folder(n) for n in ("kernels", "passes", "model_defs"))):
        parts[f"source.{folder.name}"] = _digest_folder(folder)
    parts |= {f"plugin.{name}": digest for name, digest in digests().items()}
    parts["torch"] = torch.__version__
    parts["python"] = platform.python_version()
    parts["machine"] = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return parts


def key_of(parts: Mapping[str, str]) -> str:
    """Return the directory name of a pack with these parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def save(
    directory: Path, parts: Mapping[str, str], program: Program, buffers: Mapping[str, Tensor], *,
    name: str | None = None, load_with: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write a pack to `directory / name` (by default its key), whole or not at all; a complete one of another process
    is kept. `load_with` says how to load it without being told: the checkpoint's path and the runner's options."""
    from safetensors.torch import save as tensors_to_bytes

    files = {
        "program.py": program.source.encode(),
        "buffers.safetensors": tensors_to_bytes({k: v.detach().cpu().contiguous() for k, v in buffers.items()}),
    }
    files |= {f"{name}.pt2": path.read_bytes() for name, path in program.packages.items()}
    described = asdict(program)
    del described["source"], described["packages"]
    manifest = {
        "format": FORMAT,
        "parts": dict(parts),
        "load_with": dict(load_with or {}),
        "program": described,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    files["manifest.json"] = json.dumps(manifest, indent=1).encode()
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / (name or key_of(parts))
    staging = Path(tempfile.mkdtemp(prefix=".writing-", dir=directory))
    try:
        for name, data in files.items():
            (staging / name).write_bytes(data)
        if target.exists() and not _complete(target, parts):
            shutil.rmtree(target)
        try:
            os.rename(staging, target)
        except OSError:
            if not _complete(target, parts):  # another process's pack came first: it is as good as ours
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def load(
    directory: Path, parts: Mapping[str, str], name: str | None = None
) -> tuple[Program, dict[str, Tensor]] | None:
    """Return the pack for `parts`, None when there is none. Raises PackRefused when it is damaged or foreign."""
    target = directory / (name or key_of(parts))
    return _read(target, parts) if target.is_dir() else None


def is_pack(directory: Path) -> bool:
    """Return whether a directory holds a pack."""
    return (directory / "manifest.json").is_file() and (directory / "program.py").is_file()


def manifest_of(target: Path) -> dict[str, Any]:
    """Return a pack's manifest. Raises PackRefused when it cannot be read or has another format."""
    try:
        manifest: dict[str, Any] = json.loads((target / "manifest.json").read_bytes())
        if manifest["format"] != FORMAT:
            raise PackRefused(f"pack {target}: format {manifest['format']}, wanted {FORMAT}")
        return manifest
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise PackRefused(f"pack {target}: cannot be read: {error!r}") from error


def explain_key(a: Mapping[str, str], b: Mapping[str, str]) -> list[str]:
    """Return a line for each part in which two keys differ; a configuration's line names the settings that do."""
    lines = []
    for part in sorted({*a, *b}):
        left, right = a.get(part, "absent"), b.get(part, "absent")
        if left == right:
            continue
        config = part.startswith("config.") and "absent" not in (left, right)
        first, second = (json.loads(left), json.loads(right)) if config else (None, None)
        if isinstance(first, dict) and isinstance(second, dict):
            names = sorted(k for k in {*first, *second} if first.get(k, "absent") != second.get(k, "absent"))
            lines += [f"{part}.{k}: {first.get(k, 'absent')} | {second.get(k, 'absent')}" for k in names]
        else:
            lines.append(f"{part}: {left} | {right}")
    return lines


def _read(target: Path, parts: Mapping[str, str]) -> tuple[Program, dict[str, Tensor]]:
    from safetensors.torch import load as tensors_from_bytes

    try:
        manifest = manifest_of(target)
        if differing := explain_key(manifest["parts"], parts):
            raise PackRefused(f"pack {target}: made for something else (pack | wanted): {'; '.join(differing)}")
        files = {}
        for name, wanted in manifest["sha256"].items():
            files[name] = (target / name).read_bytes()
            if hashlib.sha256(files[name]).hexdigest() != wanted:
                raise PackRefused(f"pack {target}: {name} does not have the digest its manifest states")
        described = manifest["program"]
        described["inputs"] = tuple(described["inputs"])
        described["packages"] = {Path(n).stem: target / n for n in files if n.endswith(".pt2")}
        described["ranges"] = [TokenRange(**r) for r in described["ranges"]]
        described["reports"] = [
            Report(**{**r, "misses": [Miss(**m) for m in r["misses"]]}) for r in described["reports"]
        ]
        return Program(source=files["program.py"].decode(), **described), tensors_from_bytes(
            files["buffers.safetensors"]
        )
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise PackRefused(f"pack {target}: cannot be read: {error!r}") from error


def _complete(target: Path, parts: Mapping[str, str]) -> bool:
    try:
        _read(target, parts)
    except PackRefused:
        return False
    return True


def _folder(name: str) -> Path:
    import importlib.util

    spec = importlib.util.find_spec(f"seamwise.{name}")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _digest_folder(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h", ".json"):
            total.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]
