"""A pack: a directory that holds a compiled model, so that a warm start neither traces nor compiles.

    manifest.json      format, key with its parts, program (calls, recipes, inputs, reports), sha256 of every file
    program.py         the generated code
    piece_*.pt2        pieces that Inductor compiled (zip archives of a shared object, its source and JSON)
    buffers.safetensors  buffers of the model that no checkpoint holds (RoPE frequencies)

Everything is text or plain tensors: nothing is ever unpickled. The key covers all that the program is computed from:
the model's configuration, every source file of Seamwise that shapes it, the toolchain and the machine. It cannot be the
traced graph itself, which a warm start does not have.

A pack is code. One that is found by its key is run only from a folder that nobody else can write; one that is given in
a model's place only when it was made here, which the cache remembers, or is asked for as a pack, by its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seamwise import caches
from seamwise.passes import Miss, Report

from .parameter import Parameter
from .plugins import digests
from .program import CacheGroup, Program, TokenRange

FORMAT = 6
_SOURCES = ("kernels", "passes", "model_defs", "runtime.build", "runtime.weights", "runtime.distributed")
_STAGING = ".seamwise-writing-"
_MOST_PACKS = 64  # kept in the cache; the least recently used go first
_PLAIN = re.compile(r"\w[\w.-]*")


class PackRefused(ValueError):
    """A pack cannot be used: truncated, tampered with, or made for something else."""


def key_parts(configuration: Mapping[str, Any], *, device: str, entry: str) -> dict[str, str]:
    """Return what a pack depends on, each part by name: the caller's configuration, our sources, toolchain, machine."""
    parts = {f"config.{k}": json.dumps(v, sort_keys=True, default=str) for k, v in sorted(configuration.items())}
    for name, folder in (("compile", Path(__file__).parent), *((n, _folder(n)) for n in _SOURCES)):
        parts[f"source.{name}"] = _digest_folder(folder)
    parts |= {f"plugin.{name}": digest for name, digest in digests().items()}
    parts["torch"] = torch.__version__
    parts["python"] = platform.python_version()
    if entry == "transformers":  # its code is what is traced
        parts["transformers"] = version("transformers")
    if torch.device(device).type == "cuda":
        parts["triton"] = version("triton")
        major, minor = torch.cuda.get_device_capability(device)
        parts["device"] = f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"
    else:
        parts["machine"] = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_instruction_sets()}"
    return parts


def _instruction_sets() -> str:
    """Return a digest of the instruction sets that the machine names: compilers are told to use them all."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    flags = next(
        (line.partition(":")[2].split() for line in lines if line.lower().startswith(("flags", "features"))), []
    )
    return hashlib.sha256(" ".join(sorted(flags)).encode()).hexdigest()[:8]


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
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "parts": dict(parts),
        "load_with": dict(load_with or {}),
        "program": described,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    manifest["digest"] = _digest(manifest)
    files["manifest.json"] = json.dumps(manifest, indent=1).encode()
    target = directory / (name or key_of(parts))
    if name is None:
        caches.make_private(directory)
    directory.mkdir(parents=True, exist_ok=True)
    caches.remove_left_overs(directory, _STAGING)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=directory))
    try:
        for file, data in files.items():
            (staging / file).write_bytes(data)
        if target.exists() and (name is not None or not _complete(target, parts)):
            shutil.rmtree(target)
        try:
            os.rename(staging, target)
        except OSError:
            if not _complete(target, parts):  # another process's pack came first: it is as good as ours
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if directory == caches.folder("packs"):
        caches.keep_newest(directory, _MOST_PACKS)
    return target


def remember(target: Path) -> None:
    """Note in the cache that a pack was made here, so that it may stand in a model's place. Raises OSError."""
    (caches.make_private(caches.folder("made")) / _manifest_digest(target)).touch()


def load(
    directory: Path, parts: Mapping[str, str], name: str | None = None
) -> tuple[Program, dict[str, Tensor]] | None:
    """Return the pack for `parts`, None when there is none. Raises PackRefused when it is damaged or foreign, or lies
    under its key where others can write."""
    target = directory / (name or key_of(parts))
    if not target.is_dir():
        return None
    if name is None:
        try:
            caches.check_private(directory)
            caches.check_private(target)
        except PermissionError as error:
            raise PackRefused(f"packs are code: {error}") from error
    found = _read(target, parts)
    if name is None:
        with contextlib.suppress(OSError):  # a folder that may be read only
            os.utime(target)
    return found


def is_pack(directory: Path) -> bool:
    """Return whether a directory holds a pack, and is no model's."""
    names = ("manifest.json", "program.py")
    return not (directory / "config.json").exists() and all((directory / name).is_file() for name in names)


def made_here(target: Path) -> bool:
    """Return whether this user made a pack: `remember` noted its manifest's digest."""
    folder = caches.folder("made")
    if not folder.is_dir():
        return False
    caches.check_private(folder)
    return (folder / _manifest_digest(target)).exists()


def manifest_of(target: Path) -> dict[str, Any]:
    """Return a pack's manifest. Raises PackRefused when it cannot be read, has another format, or was changed."""
    try:
        manifest: dict[str, Any] = json.loads((target / "manifest.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise PackRefused(f"pack {target}: cannot be read: {error!r}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise PackRefused(f"pack {target}: its manifest.json has format {found!r}, wanted {FORMAT}")
    if manifest.pop("digest", None) != _digest(manifest):
        raise PackRefused(f"pack {target}: manifest.json does not have the digest that it states")
    return manifest


def _digest(manifest: Mapping[str, Any]) -> str:
    read = json.loads(json.dumps(manifest))  # as it will be read: keys are strings, tuples are lists
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


def _manifest_digest(target: Path) -> str:
    return hashlib.sha256((target / "manifest.json").read_bytes()).hexdigest()


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
            if not _PLAIN.fullmatch(name):
                raise PackRefused(f"pack {target}: its manifest names a file {name!r}, wanted one of its own")
            files[name] = (target / name).read_bytes()
            if hashlib.sha256(files[name]).hexdigest() != wanted:
                raise PackRefused(f"pack {target}: {name} does not have the digest its manifest states")
        described = manifest["program"]
        described["inputs"] = tuple(described["inputs"])
        described["kv_groups"] = [CacheGroup(**{**g, "layers": tuple(g["layers"])}) for g in described["kv_groups"]]
        described["parameters"] = {
            name: Parameter(shape=tuple(p["shape"]), dtype=p["dtype"], aliases=tuple(p["aliases"]))
            for name, p in described["parameters"].items()
        }
        described["packages"] = {Path(n).stem: target / n for n in files if n.endswith(".pt2")}
        described["ranges"] = [TokenRange(**r) for r in described["ranges"]]
        described["reports"] = [
            Report(**{**r, "misses": [Miss(**m) for m in r["misses"]]}) for r in described["reports"]
        ]
        return Program(source=files["program.py"].decode(), **described), tensors_from_bytes(
            files["buffers.safetensors"]
        )
    except PackRefused:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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
