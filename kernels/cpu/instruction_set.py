"""The instruction set that the CPU kernels are compiled for and run with: the machine's own, or a lesser one.

It is a setting of the process, made in code, and part of every build's name: one machine measures and tests what
others run. Weights packed under one setting are read under the other; sums may be rounded apart.
"""

from __future__ import annotations

import functools
import platform

import torch

_X86 = platform.machine() in ("x86_64", "AMD64")
FLAGS = {  # the names are those of x86-64's levels: v4 has AVX-512 without its bfloat16, v3 AVX2, FMA and F16C
    "native": ("-march=native",),
    "avx512": ("-march=x86-64-v4", "-mtune=native"),
    "avx2": ("-march=x86-64-v3", "-mtune=native"),
    "baseline": ("-march=x86-64" if _X86 else "-march=armv8-a",),
}
_LEVELS = (  # the first whose macros the compiler defines names what is in use
    ("avx512_bf16", ("__AVX512BF16__", "__AVX512BW__")),
    ("avx512", ("__AVX512F__",)),
    ("avx2", ("__AVX2__", "__FMA__")),
    ("avx", ("__AVX__",)),
    ("neon", ("__aarch64__",)),
)

_current = "native"


def use(name: str) -> None:
    """Compile and run CPU kernels for `name` from now on, one of FLAGS; what torch itself computes is not affected.

    Raises ValueError for another name, RuntimeError where this machine cannot run it.
    """
    global _current
    if name not in FLAGS:
        raise ValueError(f"instruction set {name!r}: wanted one of {', '.join(map(repr, FLAGS))}")
    if name not in runnable():
        raise RuntimeError(f"instruction set {name!r}: this machine runs only {', '.join(map(repr, runnable()))}")
    _current = name


@functools.cache
def runnable() -> tuple[str, ...]:
    """Return the names that this machine can run."""
    lacks = {"avx512": not torch.cpu._is_avx512_supported(), "avx2": not torch.cpu._is_avx2_supported()}
    return tuple(name for name in FLAGS if not lacks.get(name, False))


def current() -> str:
    """Return the name in use."""
    return _current


def level(macros: bytes) -> str:
    """Return the instructions that kernels use, given the macros that the compiler defines: "avx512_bf16", "avx512",
    "avx2", "avx", "neon" or "baseline"."""
    defined = {line.split()[1].decode() for line in macros.splitlines() if line.startswith(b"#define ")}
    return next((name for name, needed in _LEVELS if defined.issuperset(needed)), "baseline")
