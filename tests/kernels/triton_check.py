"""Compile every Triton kernel for GPUs that are not here, and read what it takes: registers, spills, shared memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seamwise.kernels.contract import Build, Contract
from seamwise.kernels.lazy_triton import jitted

# Bytes of shared memory a block may have (CUDA programming guide, table of compute capabilities).
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
_POINTERS = {"bf16": "*bf16", "fp32": "*fp32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one kernel takes at one configuration on one architecture."""

    kernel: str
    capability: int
    dtype: str
    config: dict[str, Any]
    registers: int
    stack_bytes: int
    shared_bytes: int


def builds_of(contract: Contract, capability: int) -> list[tuple[str, Build]]:
    """Return (dtype, build) for every configuration a contract's file names that a GPU of this capability can run."""
    return [(d, b) for d in _POINTERS for b in contract.triton_builds(d) if capability >= b.min_capability]


def usages(contract: Contract, capability: int, builds: Iterable[tuple[str, Build]]) -> Iterator[Usage]:
    """Compile some of a contract's Triton kernels and tell what each takes."""
    for dtype, build in builds:
        yield _compile(contract.name, build, dtype, capability)


def _compile(name: str, build: Build, dtype: str, capability: int) -> Usage:
    signature = {}
    for parameter in build.kernel.params:
        default = _POINTERS[dtype] if parameter.name.endswith("_ptr") else "i32"
        signature[parameter.name] = build.types.get(parameter.name, default)
    config = dict(build.constants)
    options = {k: v for k, v in config.items() if k in ("num_warps", "num_stages")}
    constants = {k: v for k, v in config.items() if k not in options}
    signature |= dict.fromkeys(constants, "constexpr")
    # What the JIT would see of aligned tensors: pointers, strides and widths are multiples of 16.
    suffixes, widths = ("_ptr", "stride", "_token", "_head", "_block"), ("D", "K", "N")
    aligned = [i for i, n in enumerate(signature) if n not in constants and (n.endswith(suffixes) or n in widths)]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=jitted(build.kernel), signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _resources(compiled.asm["cubin"])
    return Usage(
        kernel=name, capability=capability, dtype=dtype, config=config, registers=registers, stack_bytes=stack,
        shared_bytes=compiled.metadata.shared,
    )  # fmt: skip


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return registers a thread and bytes of stack (what spills use) that `cuobjdump` reads from a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listed = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)", listed.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {listed.stdout!r}")
    return int(found[1]), int(found[2])
