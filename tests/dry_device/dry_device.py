"""A CUDA device that is not there: fake tensors under the product, and Triton compiling for it without launching.

Everything that can be known without a GPU is known by it: which provider serves a call on "cuda", whether its kernels
are specialised and compile for sm_90, whether values are copied between host and device where a graph would be
captured, and how many kernels were launched.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch._subclasses.fake_tensor as fake_tensor
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, MockTensor

CAPABILITY = 90


@dataclass
class Seen:
    """What one call did: kernels in order; ops that computed; copies between host and device, and waits for a value."""

    launches: list[str] = field(default_factory=list)
    ops: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)

    def waits(self, value: Tensor) -> int:
        """Note that a value of the device was asked for, and give a number."""
        self.copies.append("int() waits for a value")
        return 64


class Driver:
    """What Triton's launcher asks of a driver before it would launch."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


class Pointer(MockTensor):
    """A tensor as Triton specialises on it: its dtype, and whether its address is a multiple of 16."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.dtype)
        self._offset = tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self._offset


class Watch(TorchDispatchMode):
    """Notes every op that computes, and what crosses between host and device."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.device((kwargs or {}).get("device") or "cpu").type == "cuda":
            for tensor in tree_leaves(args):  # where its value is known, it would really be copied
                if isinstance(tensor, FakeTensor):
                    tensor.constant = None
        if func is torch.ops.aten._local_scalar_dense.default:
            self.seen.copies.append(f"{func} waits for a value")
        result = func(*args, **(kwargs or {}))
        given = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()}
        made = {t.device.type for t in tree_leaves(result) if isinstance(t, Tensor)}
        if ("cpu" in given and "cuda" in made) or ("cuda" in given and "cpu" in made):
            self.seen.copies.append(f"{func} copies between host and device")
        if not func.is_view:
            self.seen.ops.append(str(func))
        return result


def get_item(self: FakeTensor, index: Any) -> Tensor:
    """Index by views: Python's own indexing asks for a guard of the device, which is not there."""
    given = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(i, (Tensor, list)) for i in given):
        tensors = [i if isinstance(i, Tensor) else None for i in given]
        return torch.ops.aten.index.Tensor(self, tensors)
    if Ellipsis in given:
        at = given.index(Ellipsis)
        used = sum(i is not None for i in given) - 1
        given[at : at + 1] = [slice(None)] * (self.dim() - used)
    result: Tensor = self
    dim = 0
    for i in given:
        if isinstance(i, int):
            result = torch.ops.aten.select.int(result, dim, i)
            continue
        if i is None:
            result = result.unsqueeze(dim)
        elif i != slice(None):
            result = torch.ops.aten.slice.Tensor(result, dim, i.start, i.stop, 1 if i.step is None else i.step)
        dim += 1
    return result


def contiguous(self: FakeTensor) -> Tensor:
    """As Tensor.contiguous, which asks for a guard of the device too."""
    return self if self.is_contiguous() else torch.ops.aten.clone.default(self, memory_format=torch.contiguous_format)


def copy_(self: FakeTensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """As Tensor.copy_, which asks for a guard of the device too."""
    return torch.ops.aten.copy_.default(self, source, non_blocking)


def pretend(patch: pytest.MonkeyPatch) -> None:
    """Let torch say that there are two GPUs of sm_90, of which a thread has one current."""
    major, minor = divmod(CAPABILITY, 10)
    current = [0]

    def exchange(index: int) -> int:
        before = current[0]
        if index >= 0:
            current[0] = index
        return before

    properties = types.SimpleNamespace(multi_processor_count=132, total_memory=141 << 30, major=major, minor=minor)
    patch.setattr(fake_tensor, "init_gpu_context", lambda *args, **given: None)
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: 2)
    patch.setattr(torch.cuda, "current_device", lambda: current[0])
    patch.setattr(torch.cuda, "set_device", lambda device: exchange(torch.device(device).index))
    for name in ("_exchange_device", "_maybe_exchange_device"):
        patch.setattr(torch.cuda, name, exchange)
    patch.setattr(torch.cuda, "get_device_capability", lambda *args: (major, minor))
    patch.setattr(torch.cuda, "get_device_properties", lambda *args: properties)
    patch.setattr(torch.cuda, "get_device_name", lambda *args: "Dry-Device")
    patch.setattr(torch.cuda, "mem_get_info", lambda *args: (140 << 30, 141 << 30))
    patch.setattr(FakeTensor, "__getitem__", get_item, raising=False)
    patch.setattr(FakeTensor, "contiguous", contiguous, raising=False)
    patch.setattr(FakeTensor, "copy_", copy_, raising=False)


@contextlib.contextmanager
def device(monkeypatch: pytest.MonkeyPatch, *, compiled: bool) -> Iterator[Seen]:
    """Make "cuda" the fake device within; `compiled`: each launch is specialised and compiled, else only counted."""
    seen = Seen()
    with monkeypatch.context() as patch:
        pretend(patch)
        patch.setattr(FakeTensor, "__setitem__", lambda self, index, value: None, raising=False)
        patch.setattr(FakeTensor, "__len__", lambda self: self.shape[0], raising=False)
        patch.setattr(FakeTensor, "data_ptr", lambda self: 0, raising=False)
        patch.setattr(FakeTensor, "__int__", lambda self: seen.waits(self), raising=False)
        run = JITFunction.run

        def launch(self: Any, *args: Any, grid: Any, warmup: bool, **given: Any) -> Any:
            here = torch.device("cuda", torch.cuda.current_device())
            away = {a.device for a in args if isinstance(a, Tensor)} - {here}
            assert not away, f"{self.fn.__name__} is launched on {here}, and given tensors on {away}"
            sizes = grid(given) if callable(grid) else grid
            for size, most in zip(sizes, (2**31 - 1, 65_535, 65_535), strict=False):
                assert 0 < int(size) <= most, f"{self.fn.__name__}: grid {sizes}"
            seen.launches.append(self.fn.__name__)
            if not compiled:
                return None
            pointers = [Pointer(a) if isinstance(a, Tensor) else a for a in args]
            with torch._C.DisableTorchFunction():
                return run(self, *pointers, grid=grid, warmup=True, **given)

        patch.setattr(JITFunction, "run", launch)
        before = driver._active
        driver.set_active(Driver())
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), Watch(seen):
                yield seen
        finally:
            driver._active = before


@dataclass(frozen=True)
class FakeDraw:
    """As Draw, of fake tensors: sizes and dtypes, no values."""

    dtype: torch.dtype
    device: str = "cuda"
    seed: int = 0

    def __call__(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.device)

    uniform = normal

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def permutation(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int64, device=self.device)

    def batch(self, requests: int, queries: int, context: int, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
        most = -(-(context + requests - 1 + queries) // block_size)
        shapes = ((requests, most), (requests,), (requests + 1,))
        table_RB, lengths_R, starts_S = (torch.empty(s, dtype=torch.int32, device=self.device) for s in shapes)
        return table_RB, lengths_R, starts_S

    def slots(self, tokens: int, block_size: int) -> tuple[int, Tensor]:
        return -(-tokens // block_size) + 2, torch.empty(tokens, dtype=torch.int64, device=self.device)
