"""Which tiers there are, from the options of an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .block_store import BlockMemory, BlockStore
from .disk_tier import DiskTier
from .offload import Offload
from .rank_stores import RankStores
from .stored_block import HEAD_BYTES
from .tiers import HostTier, Tier

_GIB = 1 << 30
MIN_TOKENS = 32  # the shortest that `seamwise bench kv` has loaded: it paid 7 x from memory, 3 x from disk


def open_store(
    memory: BlockMemory, *, host_bytes: int = 0, folder: Path | None = None, folder_bytes: int = 0, rank: int = 0,
    num_ranks: int = 1,
) -> BlockStore:  # fmt: skip
    """Return a process's tiers, with its share of so many bytes. Of a folder, each of several ranks has one inside."""
    tiers: list[Tier] = []
    if host_bytes:
        tiers.append(HostTier(host_bytes // num_ranks))
    if folder is not None:
        part = f"rank{rank}of{num_ranks}" if num_ranks > 1 else ""
        tiers.append(DiskTier(folder, folder_bytes // num_ranks, part))
    return BlockStore(memory, tiers)


def make_offload(
    memory: Any, *, ahead: int, num_ranks: int, enable_prefix_caching: bool,
    on_ranks: Callable[..., RankStores] | None = None,
    kv_offloading_size: float | None = None, kv_offloading_backend: str | None = None,
    kv_offloading_folder: str | Path | None = None, kv_offloading_folder_size: float | None = None,
    kv_offloading_min_tokens: int | None = None,
) -> Offload | None:  # fmt: skip
    """Return the tiers that are asked for, None where none is. Raises ValueError naming what contradicts.

    on_ranks  does what open_store does on each of num_ranks in processes of their own, whose cache `memory` stands for
    kv_offloading_size     GiB of the machine's memory for blocks that leave the KV cache, of all ranks
    kv_offloading_backend  "native", the only one
    kv_offloading_folder, kv_offloading_folder_size  where further blocks are kept beyond the process, and GiB of them,
                           of all ranks
    kv_offloading_min_tokens  a prompt of which tiers have fewer tokens more than the cache is computed
    """
    sizes = {"kv_offloading_size": kv_offloading_size, "kv_offloading_folder_size": kv_offloading_folder_size}
    others: dict[str, Any] = {
        "kv_offloading_backend": kv_offloading_backend, "kv_offloading_min_tokens": kv_offloading_min_tokens
    }  # fmt: skip
    if (kv_offloading_folder is None) != (kv_offloading_folder_size is None):
        raise ValueError("kv_offloading_folder and kv_offloading_folder_size (GiB) go together; give both or none")
    if kv_offloading_size is None and kv_offloading_folder is None:
        for name, value in others.items():
            if value is not None:
                raise ValueError(f"{name} needs kv_offloading_size or kv_offloading_folder, which say where blocks go")
        return None
    if num_ranks > 1 and on_ranks is None:
        raise ValueError(
            f"kv_offloading_size and kv_offloading_folder with {num_ranks} ranks that decide for themselves: they would"
            " load different blocks; let one process start them (distributed_executor_backend='mp'), or leave"
            " kv_offloading_* out"
        )
    if not enable_prefix_caching:
        raise ValueError("enable_prefix_caching=False: stored blocks are found as prefixes; leave kv_offloading_* out")
    if kv_offloading_backend not in (None, "native"):
        raise ValueError(f"kv_offloading_backend={kv_offloading_backend!r}: wanted 'native', which is Seamwise's own")
    least = num_ranks * (HEAD_BYTES + memory.kv_block_bytes)
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, (int, float)) or size * _GIB < least):
            raise ValueError(f"{name}={size!r}: wanted GiB, at least those of one block of {least} bytes")
    least_tokens = MIN_TOKENS if kv_offloading_min_tokens is None else kv_offloading_min_tokens
    if type(least_tokens) is not int or least_tokens < 1:
        raise ValueError(f"kv_offloading_min_tokens={kv_offloading_min_tokens!r}: wanted 1 or more")
    of_memory, of_folder = (int((size or 0) * _GIB) for size in sizes.values())
    folder = None if kv_offloading_folder is None else Path(kv_offloading_folder).expanduser()
    given: dict[str, Any] = {"host_bytes": of_memory, "folder": folder, "folder_bytes": of_folder}
    store = open_store(memory, **given) if on_ranks is None else on_ranks(**given)
    return Offload(store, ahead=ahead, min_tokens=least_tokens)
