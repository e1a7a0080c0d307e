"""These tests need Triton's interpreter, which is chosen before triton is imported, or a GPU.

The interpreter's conversions drop a carry into the exponent, round ties up and truncate to bfloat16, and its dot takes
bfloat16 for integers (triton 3.9, and issue #4972). Here torch converts, so that bfloat16 and float8 can be tested.
That of triton 3.6 makes numbers of arrays in a way that numpy 2.5 refuses, and knows no constant of bfloat16.
It patches triton's language at each call of a kernel or a function of one, a third of these tests' time; here once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from seamwise.kernels.lazy_triton import interprets

collect_ignore_glob = [] if interprets() or torch.cuda.is_available() else ["test_*.py"]

TORCH_TYPES = {
    tl.float64: torch.float64, tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2,
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.gpu)


def _convert_float(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
    wide = torch.from_numpy(np.ascontiguousarray(data)).view(TORCH_TYPES[source]).to(torch.float64)
    bits = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}[TORCH_TYPES[target].itemsize]
    return wide.to(torch.float32).to(TORCH_TYPES[target]).view(bits).numpy().reshape(data.shape)


def _create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    left, right = (
        _convert_float(x.data, x.dtype.scalar, tl.float32, None).view(np.float32) if x.dtype.scalar in TORCH_TYPES
        else x.data.astype(d.data.dtype)
        for x in (a, b)
    )  # fmt: skip
    # Each row by itself, as a GPU's: what a library multiplies at once depends on the processor and on where a row is.
    rows = np.matmul(left[..., :, None, :], right[..., None, :, :], dtype=d.data.dtype)[..., 0, :]
    return interpreter.TensorHandle(rows + d.data, d.dtype.scalar)


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _patched(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _get_bf16(self: Any, value: float) -> Any:
    wide = self.get_fp32(value)
    return interpreter.TensorHandle(_convert_float(wide.data, tl.float32, tl.bfloat16, None), tl.bfloat16)


def _patch_lang(function: Any) -> Any:
    modules = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
    if not modules <= _patched_modules:
        _patched_modules.update(modules)
        _patch_modules(function)  # to stay: in this process nothing compiles
    return interpreter._LangPatchScope()


_patched_modules: set[int] = set()
_patch_modules = interpreter._patch_lang
_patched = interpreter._patch_lang_tensor
if interprets():
    interpreter._patch_lang, interpreter._patch_lang_tensor = _patch_lang, _patch_lang_tensor
    interpreter.InterpreterBuilder.get_bf16 = _get_bf16
    interpreter._convert_float = _convert_float
    interpreter.InterpreterBuilder.create_dot = _create_dot
