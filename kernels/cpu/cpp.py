"""Compile a C++ source of this package at first use, cache the shared object, load it through ctypes.

A source has a plain C interface (pointers, int64 sizes and strides) and includes no torch header, so that it compiles
in a second or two. It takes its threads from the OpenMP runtime torch has already loaded, by declaring `GOMP_parallel`
itself: no `-fopenmp`, hence no second runtime whose idle threads spin against torch's, whatever the compiler is.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch  # noqa: F401  (its OpenMP runtime must be in the process before a library that calls it is loaded)

from seamwise import caches

from . import instruction_set

_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-strict-aliasing", "-shared", "-fPIC")
COMPILERS = ("g++", "clang++", "c++")
_MOST_BUILDS = 256  # kept in the cache folder; the least recently built go first
_INCLUDE = re.compile(rb'^\s*#include\s+"([^"]+)"', re.MULTILINE)


def flags(*extra: str) -> tuple[str, ...]:
    """Return the compiler's flags for the instruction set in use, and `extra` ones."""
    return (*_FLAGS, *instruction_set.FLAGS[instruction_set.current()], *extra)


def instructions() -> str:
    """Return what the kernels in use are compiled to, e.g. "avx512_bf16" or "avx2" (see instruction_set.level)."""
    return instruction_set.level(_predefined_macros(flags(), find_compiler()))


def load(
    source: Path, *, cache_dir: Path | None = None, extra: tuple[str, ...] = (), compiler: str | None = None
) -> ctypes.CDLL:
    """Return the library built from `source`, compiling it when the cache folder has no whole build of exactly this.

    The build's name holds a digest of the source, the headers it includes with quotes, the flags (those of the
    instruction set in use, and `extra`), and the compiler's predefined macros (its version and, under -march=native,
    the machine's instruction sets). Its last bytes are a digest of those before: a file that was cut short would kill
    the process that loads it.
    Raises RuntimeError when there is no compiler, with the compiler's message, or where others can write the folder.
    """
    return _load(source, cache_dir, flags(*extra), compiler)


@functools.cache
def _load(source: Path, cache_dir: Path | None, flags: tuple[str, ...], compiler: str | None) -> ctypes.CDLL:
    compiler = find_compiler() if compiler is None else compiler
    folder = caches.folder("cpp") if cache_dir is None else cache_dir
    target = folder / f"{source.stem}-{build_key(source, flags, compiler)}.so"
    try:
        whole = _is_whole(target)
        if whole:
            caches.check_private(folder)
            caches.check_private(target)
    except PermissionError as error:
        raise RuntimeError(f"compiled kernels: {error}") from error
    if not whole:
        _compile(source, target, flags, compiler)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise RuntimeError(
            f"{target} does not load: {error}; its compiler makes nothing this Python can load"
        ) from error


def _is_whole(target: Path) -> bool:
    """Return whether a build is there, as long as it was written."""
    if not target.exists():
        return False
    content = target.read_bytes()
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


def find_compiler() -> str:
    """Return the path of the first C++ compiler on PATH. Raises RuntimeError when there is none."""
    for name in COMPILERS:
        if path := shutil.which(name):
            return path
    raise RuntimeError(
        f"no C++ compiler on PATH (looked for {', '.join(COMPILERS)}): the CPU kernels are compiled at first use; "
        "install one, e.g. `apt-get install g++` or `dnf install gcc-c++`"
    )


def build_key(source: Path, flags: tuple[str, ...], compiler: str) -> str:
    """Return a digest of everything the build of `source` depends on."""
    digest = hashlib.sha256()
    for path in sorted(_with_headers(source)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update("\0".join(flags).encode())
    digest.update(_predefined_macros(flags, compiler))
    return digest.hexdigest()[:16]


def _with_headers(source: Path) -> set[Path]:
    found: set[Path] = set()
    pending = [source]
    while pending:
        path = pending.pop()
        if path not in found:
            found.add(path)
            pending += [path.parent / name.decode() for name in _INCLUDE.findall(path.read_bytes())]
    return found


@functools.cache
def _predefined_macros(flags: tuple[str, ...], compiler: str) -> bytes:
    command = [compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull]
    return _run(command, f"{compiler} does not answer").stdout


def _compile(source: Path, target: Path, flags: tuple[str, ...], compiler: str) -> None:
    """Compile into a temporary file beside `target`, then rename it: another process sees a whole file or none.

    A thread or process that wants the same waits for this one and takes its build: ranks start all at once.
    """
    try:
        caches.make_private(target.parent)
        caches.remove_left_overs(target.parent, f".{source.stem}-")
        caches.keep_newest(target.parent, _MOST_BUILDS)
        lock = target.with_name(f".{target.name}.lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{source.stem}-", suffix=".so")
    except OSError as error:
        raise RuntimeError(
            f"cannot write compiled kernels to {target.parent}: {error}; make it writable,"
            " or choose another folder with cache_dir="
        ) from error
    os.close(descriptor)
    try:
        if not _is_whole(target):
            _run([compiler, *flags, "-o", temporary, str(source)], f"{source} does not compile")
            with open(temporary, "r+b") as file:  # what follows the sections of a shared object is not read
                digest = hashlib.sha256(file.read()).digest()
                file.write(digest)
            os.replace(temporary, target)
    finally:
        for path in (temporary, lock.name):
            Path(path).unlink(missing_ok=True)
        lock.close()


def _run(command: list[str], complaint: str) -> subprocess.CompletedProcess[bytes]:
    try:
        result = subprocess.run(command, capture_output=True, check=False)
    except OSError as error:
        raise RuntimeError(f"{complaint}: {' '.join(command)}: {error}") from error
    if result.returncode != 0:
        message = result.stderr.decode(errors="replace")[-4000:]
        raise RuntimeError(f"{complaint} ({' '.join(command)}):\n{message}")
    return result
