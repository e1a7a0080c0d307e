"""Which tiers there are, from the options of an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .disk_tier import DiskTier
from .offload import BlockMemory, Offload
from .stored_block import HEAD_BYTES
from .tiers import HostTier, Tier

_GIB = 1 << 30
MIN_TOKENS = 32  # the shortest that `seamwise bench kv` has loaded: it paid 7 x from memory, 3 x from disk


def make_offload(
    memory: BlockMemory, *, ahead: int, num_ranks: int, enable_prefix_caching: bool,
    kv_offloading_size: float | None = None, kv_offloading_backend: str | None = None,
    kv_offloading_folder: str | Path | None = None, kv_offloading_folder_size: float | None = None,
    kv_offloading_min_tokens: int | None = None,
) -> Offload | None:  # fmt: skip
    """Return the tiers that are asked for, None where none is. Raises ValueError naming what contradicts.

    kv_offloading_size     GiB of the machine's memory for blocks that leave the KV cache
    kv_offloading_backend  "native", the only one
    kv_offloading_folder, kv_offloading_folder_size  where further blocks are kept beyond the process, and GiB of them
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
    if num_ranks > 1:
        raise ValueError(
            f"kv_offloading_size and kv_offloading_folder with {num_ranks} ranks: blocks are copied from one process's"
            " cache; leave them, or tensor_parallel_size and data_parallel_size, out"
        )
    if not enable_prefix_caching:
        raise ValueError("enable_prefix_caching=False: stored blocks are found as prefixes; leave kv_offloading_* out")
    if kv_offloading_backend not in (None, "native"):
        raise ValueError(f"kv_offloading_backend={kv_offloading_backend!r}: wanted 'native', which is Seamwise's own")
    least = HEAD_BYTES + memory.kv_block_bytes
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, (int, float)) or size * _GIB < least):
            raise ValueError(f"{name}={size!r}: wanted GiB, at least those of one block of {least} bytes")
    least_tokens = MIN_TOKENS if kv_offloading_min_tokens is None else kv_offloading_min_tokens
    if type(least_tokens) is not int or least_tokens < 1:
        raise ValueError(f"kv_offloading_min_tokens={kv_offloading_min_tokens!r}: wanted 1 or more")
    tiers: list[Tier] = []
    if kv_offloading_size is not None:
        tiers.append(HostTier(int(kv_offloading_size * _GIB)))
    if kv_offloading_folder is not None and kv_offloading_folder_size is not None:
        tiers.append(DiskTier(Path(kv_offloading_folder).expanduser(), int(kv_offloading_folder_size * _GIB)))
    return Offload(memory, tiers, ahead=ahead, min_tokens=least_tokens)
