"""Triton's names for files of kernels, without importing Triton before a kernel is launched.

Importing it takes 0.26 s and 65 MiB, and a process that serves on a CPU launches none. `triton.jit` gives a `Kernel`;
the first launch of any, and the first other name of `triton` or `tl` that is read, imports Triton. Then whatever stands
for one of Triton's objects is replaced by it, wherever a module names it, because Triton looks names of a kernel's
source up in its module and knows its own objects only. Where Triton is imported already, as by a test that chooses its
interpreter, these names are Triton's from the start.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import triton as triton
    import triton.language as tl


class Kernel:
    """A function of Triton's language that is not Triton's yet; launching it, or reading a name of it, makes it so."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.made = function, None

    def __getitem__(self, grid: Any) -> Any:
        return jitted(self)[grid]

    def __getattr__(self, name: str) -> Any:
        return getattr(jitted(self), name)


class _Constant:
    def __init__(self, value: Any) -> None:
        self.value, self.made = value, None


class _Names:
    """Stands for a module: the names in `own` as they are there, any other from the module itself."""

    def __init__(self, module: str, **own: Callable[..., Any]) -> None:
        self.module, self.own = module, own

    def __getattr__(self, name: str) -> Any:
        if name in self.own:
            return self.own[name]
        _import()
        return getattr(sys.modules[self.module], name)


def jitted(kernel: Any) -> Any:
    """Return Triton's kernel: of a `Kernel` what it stands for, any other as it is."""
    if not isinstance(kernel, Kernel):
        return kernel
    if kernel.made is None:
        _import()
    return _made(kernel)


def _import() -> None:
    """Import Triton, and put its objects in the place of those that stand for them, in every module."""

    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        for name, value in list(names.items()):
            if type(value) in (Kernel, _Constant, _Names):
                names[name] = _made(value)


def _made(value: Any) -> Any:
    import triton

    if isinstance(value, _Names):
        return sys.modules[value.module]
    if value.made is None:
        kernel = isinstance(value, Kernel)
        value.made = triton.jit(value.function) if kernel else triton.language.constexpr(value.value)
    return value.made


def interprets() -> bool:
    """Return whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1, and Triton imported."""
    imported = sys.modules.get("triton")
    return imported is not None and bool(imported.knobs.runtime.interpret)


if "triton" in sys.modules:
    import triton as triton
    import triton.language as tl
elif not TYPE_CHECKING:
    # Launch configurations, some of which are listed when a file is imported, are made with two functions of Triton.
    _functions = {"cdiv": lambda x, y: (x + y - 1) // y, "next_power_of_2": lambda n: n and 1 << (n - 1).bit_length()}
    triton, tl = _Names("triton", jit=Kernel, **_functions), _Names("triton.language", constexpr=_Constant)
