"""The process group that ranks share a model over: every rank runs the same program on the same requests.

`torchrun --nproc-per-node 2 script.py` starts the ranks, or LLM does, whose processes `meet`; gloo carries them on
CPUs, NCCL on GPUs. Source:
https://docs.pytorch.org/docs/stable/distributed.html, https://docs.pytorch.org/docs/stable/elastic/run.html.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


def join_group(size: int, device: str, option: str) -> tuple[int, str, str]:
    """Return this process's rank among `size`, the group's name, and its device: "cuda" becomes a GPU of its own.

    option  what asked for them

    The default process group is made where torchrun started this process and nothing made it yet. Raises ValueError
    where there is none, where it has another size, or where its backend does not serve the device.
    """
    kind = torch.device(device).type
    if not dist.is_initialized():
        if not dist.is_torchelastic_launched():
            raise ValueError(
                f"{option}={size} needs {size} processes; start them with `torchrun --nproc-per-node {size}"
                " …`, or call torch.distributed.init_process_group in each first; LLM starts them by itself"
            )
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        atexit.register(leave_group)
    rank, found, backend = dist.get_rank(), dist.get_world_size(), str(dist.get_backend())
    if found != size:
        raise ValueError(f"{option}={size}: the process group has {found} ranks; wanted as many")
    if backend == "nccl" and kind != "cuda":
        raise ValueError(f"device={device!r}: the process group's backend is nccl; wanted one for CPUs, like gloo")
    if device == "cuda":
        device = f"cuda:{rank % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    group = dist.group.WORLD
    assert group is not None
    return rank, str(group.group_name), device


def meet(address: str, rank: int, size: int, device: str, timeout_s: float) -> None:
    """Make the default process group of processes that something other than torchrun started, once all are there.

    address    a file that none has made yet; timeout_s: the longest wait of a collective, not that for the start
    """
    on_gpu = torch.device(device).type == "cuda" if device != "auto" else torch.cuda.is_available()
    store = dist.FileStore(address, size)
    store.set(f"there{rank}", "")
    store.wait([f"there{other}" for other in range(size)], timedelta(hours=1))
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
    )
    atexit.register(leave_group)


def leave_group() -> None:
    """End the default process group, at least 50 ms before the interpreter may end.

    A thread of gloo's drops a collective's tensors after its caller has gone on, and needs the GIL for it: if it still
    waits when the interpreter ends, the process aborts (torch 2.13, ProcessGroupGloo::runLoop). So it is let in.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.05)


@contextmanager
def fake_group(size: int) -> Iterator[None]:
    """Stand in for rank 0 of `size` ranks, in one process: graphs are traced, nothing is sent.

    Raises ValueError where a process group exists.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ValueError("a fake process group cannot stand beside a real one; run this outside torchrun")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def smallest(value: int, device: str) -> int:
    """Return the smallest of all ranks' values."""
    agreed = torch.tensor(value, device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return int(agreed)


def check_alike(value: str, what: str) -> None:
    """Raise RuntimeError on every rank where they do not all have the same value."""
    told: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(told, value)
    if other := [rank for rank, theirs in enumerate(told) if theirs != told[0]]:
        raise RuntimeError(f"{what} differ between rank 0 and ranks {other}: start all with the same model and options")
