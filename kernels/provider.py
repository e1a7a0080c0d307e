"""What serves a contract: its providers, and the compilations of their Triton kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import lazy_triton


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """One implementation of a contract, called with the op's arguments.

    refuses   `refuses(*args)` returns why these arguments cannot be served, or None; it may read shapes, strides,
              dtypes and devices, never values, so that the compiler can ask it about fake tensors
    devices   it runs on; None: any
    triton    it runs in Triton's interpreter too
    strided   it reads what the signature keeps from kernels, because it is made of torch's ops or of other contracts
    launches  all that it computes goes through `tape.launch`, itself or by the parts it is composed of
    composed  it calls other contracts, so that a tape records these instead of it
    defers    it only chooses another provider, at each call
    """

    name: str
    call: Callable[..., Any]
    refuses: Callable[..., str | None] = lambda *args: None
    devices: tuple[str, ...] | None = None
    triton: bool = False
    strided: bool = False
    launches: bool = False
    composed: bool = False
    defers: bool = False

    def why_not(self, device: str, args: Sequence[Any], loose: str | None) -> str | None:
        """Return why this provider cannot serve `args` on `device`, or None; `loose`: why kernels do not read them."""
        interpreted = self.triton and lazy_triton.interprets()
        if self.devices is not None and device not in self.devices and not interpreted:
            return f"it runs on {'/'.join(self.devices)}, the arguments are on {device}"
        return (loose if not self.strided else None) or self.refuses(*args)


@dataclass(frozen=True, slots=True)
class Build:
    """One compilation of a Triton kernel: its constants with num_warps and num_stages, and the types of its arguments.

    Arguments named `*_ptr` point to the dtype asked for and others are i32, unless `types` says otherwise.
    """

    kernel: Any
    constants: Mapping[str, Any]
    types: Mapping[str, str] = field(default_factory=dict)

    @property
    def min_capability(self) -> int:
        """The least compute capability that compiles it: Triton converts to float8 from Ada on."""
        return 89 if any("fp8" in t for t in self.types.values()) else 80
