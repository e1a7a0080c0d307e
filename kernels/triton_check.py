"""Compile every Triton kernel for GPUs that are not here, and read what it takes: registers, spills, shared memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import add_rms_norm, attention_triton, gather_rows, kv_append, rms_norm, rope, silu_mul  # noqa: F401

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


def usages(capability: int) -> Iterator[Usage]:
    """Compile each kernel in bfloat16 and float32 at every configuration its file can choose for real widths."""
    for dtype in _POINTERS:
        for name, kernel, signature, constants in _kernels(dtype):
            yield _compile(name, kernel, signature, constants, dtype, capability)


def _kernels(dtype: str) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    from importlib import import_module

    def module(name: str) -> Any:
        return import_module(f"seamwise.kernels.{name}")

    def typed(kernel: Any, **special: str) -> dict[str, str]:
        """Pointers hold `dtype` and numbers are i32, but for the names in `special`; constants are left out."""
        found = {}
        for parameter in kernel.params:
            if not parameter.is_constexpr:
                default = _POINTERS[dtype] if parameter.name.endswith("_ptr") else "i32"
                found[parameter.name] = special.get(parameter.name, default)
        return found

    norm, add_norm, rotary = module("rms_norm"), module("add_rms_norm"), module("rope")
    silu, gather, append, attend = (module(n) for n in ("silu_mul", "gather_rows", "kv_append", "attention_triton"))
    for width in (576, 4096, 8192, 16384):
        yield "rms_norm", norm._rms_norm_kernel, typed(norm._rms_norm_kernel, eps="fp32"), norm.config(width)
        kernel = add_norm._add_rms_norm_kernel
        yield "add_rms_norm", kernel, typed(kernel, eps="fp32"), add_norm.config(width)
    for heads, width in ((9, 64), (32, 128), (1, 256)):
        yield "rope", rotary._rope_kernel, typed(rotary._rope_kernel), rotary.config(heads, width)
    for width in (256, 14336):
        yield "silu_mul", silu._silu_mul_kernel, typed(silu._silu_mul_kernel), silu.config(width)
        kernel = gather._gather_rows_kernel
        yield "gather_rows", kernel, typed(kernel, index_ptr="*i64"), gather.config(width)
    for width in (64, 128, 256):
        kernel = append._kv_append_kernel
        yield "kv_append", kernel, typed(kernel, slot_ptr="*i64"), append.config(width)
        for group, tokens, requests in ((1, 8, 8), (8, 8, 8), (3, 512, 2), (8, 4096, 2), (16, 4096, 2)):
            if (dtype, width) == ("fp32", 256):
                continue  # refused
            kernel, itemsize = attend._attention_kernel, 4 if dtype == "fp32" else 2
            integers = dict.fromkeys(("table_ptr", "length_ptr", "start_ptr"), "*i32")
            chosen = attend.config(group, tokens, requests, width, itemsize)
            precision = "ieee" if dtype == "fp32" else "tf32"
            signature = typed(kernel, scale="fp32", **integers)
            yield "attention", kernel, signature, {**chosen, "GROUP": group, "PRECISION": precision}


def _compile(
    name: str, kernel: Any, signature: dict[str, str], config: dict[str, Any], dtype: str, capability: int
) -> Usage:
    options = {k: v for k, v in config.items() if k in ("num_warps", "num_stages")}
    constants = {k: v for k, v in config.items() if k not in options}
    signature = signature | dict.fromkeys(constants, "constexpr")
    # What the JIT would see of aligned tensors: pointers, strides and widths are multiples of 16.
    suffixes = ("_ptr", "stride", "_token", "_head", "_block")
    aligned = [i for i, n in enumerate(signature) if n not in constants and (n.endswith(suffixes) or n == "D")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
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
