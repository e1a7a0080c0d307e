"""Collectives of a process group by its name, over rows, and memory that all its ranks read.

They are torch's functional collectives, so gloo and NCCL run the same code, a graph holds them, and a fake group gives
their shapes (https://docs.pytorch.org/docs/stable/distributed.html). The group "" is one rank. Shared memory is torch's
symmetric memory, https://docs.pytorch.org/docs/stable/symmetric_memory.html.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

_OPS = torch.ops._c10d_functional
_resolve: Callable[[Any], Any] = c10d._resolve_process_group  # a name is a str before torch 2.13, a GroupName since


def group_size(group_name: str) -> int:
    """Return the number of ranks."""
    return int(_resolve(group_name).size()) if group_name else 1


def group_rank(group_name: str) -> int:
    """Return this process's rank in the group."""
    return int(_resolve(group_name).rank()) if group_name else 0


def all_reduce(x: Tensor, group_name: str) -> Tensor:
    """Return the sum of all ranks' x."""
    return _OPS.wait_tensor(_OPS.all_reduce(x, "sum", group_name)) if group_name else x.clone()


def reduce_scatter_rows(x_TD: Tensor, group_name: str) -> Tensor:
    """Return this rank's share of the rows, in rank order, of the sum of all ranks' x: (⌈T / ranks⌉, D), zeros last."""
    if not group_name:
        return x_TD.clone()
    ranks = group_size(group_name)
    if missing := -x_TD.shape[0] % ranks:
        x_TD = torch.nn.functional.pad(x_TD, (0, 0, 0, missing))
    return _OPS.wait_tensor(_OPS.reduce_scatter_tensor(x_TD.contiguous(), "sum", ranks, group_name))


def all_gather_rows(x_TD: Tensor, group_name: str) -> Tensor:
    """Return all ranks' rows, in rank order: (ranks · T, D)."""
    if not group_name:
        return x_TD.clone()
    return _OPS.wait_tensor(_OPS.all_gather_into_tensor(x_TD.contiguous(), group_size(group_name), group_name))


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """One group's buffer on this rank, and the addresses of all ranks' buffers, int64 on the device, in rank order.

    workspace_bytes  of torch's GEMMs that exchange rows meanwhile
    """

    group: Any
    buffer: Tensor
    handle: Any
    peers_R: Tensor
    workspace_bytes: int

    def holds(self, x: Tensor) -> bool:
        return x.nbytes <= self.buffer.nbytes

    def copy(self, x: Tensor) -> Tensor:
        """Return x, contiguous, at the buffer's beginning."""
        return self.buffer[: x.nbytes].view(x.dtype).view(x.shape).copy_(x)


_SHARED: dict[str, SharedMemory] = {}


def share_memory(group_name: str, num_bytes: int, device: torch.device, workspace_bytes: int = 0) -> None:
    """Allocate a buffer that the group's ranks read from each other, and let the fused collectives use it.

    workspace_bytes  for `norm_between_linears` too: torch's GEMMs would allocate it when they first need so much, and
                     free what recorded steps still write to

    Every rank calls it before anything is captured; what is shared already stays where it is. The ranks must reach
    each other's memory (NVLink); torch raises RuntimeError where they cannot.
    """
    from torch._C._distributed_c10d import _SymmetricMemory

    shared = shared_memory(group_name)
    if shared is None:
        buffer = _SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, device, group_name)
        handle = _SymmetricMemory.rendezvous(buffer)
        peers_R = torch.tensor(handle.buffer_ptrs).to(device)
        shared = SharedMemory(_resolve(group_name), buffer, handle, peers_R, 0)
    if workspace_bytes > shared.workspace_bytes:
        from torch.distributed import _symmetric_memory  # defines the GEMMs' ops, too

        reserve: Callable[..., Any] = _symmetric_memory.get_symm_mem_workspace  # of a str, as _resolve
        reserve(group_name, workspace_bytes)
        shared = replace(shared, workspace_bytes=workspace_bytes)
    _SHARED[group_name] = shared


def shared_memory(group_name: str) -> SharedMemory | None:
    """Return the memory that the group's ranks share, or None: none was asked for, or by a group that has ended."""
    shared = _SHARED.get(group_name)
    return shared if shared is not None and shared.group is _resolve(group_name) else None


@contextmanager
def published(x: Tensor, group_name: str) -> Iterator[Tensor]:
    """Yield the addresses, int64 on the device in rank order, at which kernels may read every rank's contiguous x."""
    if not group_name:
        own = x.contiguous()
        # Filled on the device: a copy from the host would wait, and is refused while a graph is captured.
        yield torch.full((1,), own.data_ptr(), dtype=torch.int64, device=x.device)
        return
    shared = _SHARED[group_name]
    shared.copy(x)
    shared.handle.barrier()  # on the stream: every rank's x is there
    yield shared.peers_R
    shared.handle.barrier()  # every rank has read, the next call may write
