"""Copy blocks of the paged KV cache: copy-on-write within one, swapping between two, on the same or another device.

Source: Kwon et al. 2023, https://arxiv.org/abs/2309.06180, sections 4.4 and 4.5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Cost, contract
from seamwise.kernels.draw import Draw

_ARGS = {
    "k_from": "M K P D", "v_from": "M K P D", "k_cache": "N K P D", "v_cache": "N K P D", "source_N": "C int64",
    "target_N": "C int64",
}  # fmt: skip


def _limits(k_from: Tensor, v_from: Tensor, k_cache: Tensor, v_cache: Tensor) -> str | None:
    if (k_from.dtype, v_from.dtype) == (k_cache.dtype, v_cache.dtype):
        return None
    return f"blocks are of {k_from.dtype}, {v_from.dtype} and {k_cache.dtype}, {v_cache.dtype}, wanted the same"


@contract(
    args=_ARGS, limits=_limits, one_device=False, seam=True, mutates=("k_cache", "v_cache"), fake=lambda *args: None,
    reads_values=True,
)  # fmt: skip
def kv_copy_blocks(
    k_from: Tensor, v_from: Tensor, k_cache: Tensor, v_cache: Tensor, source_N: Tensor, target_N: Tensor
) -> None:
    """Copy block source[i] of k_from and v_from to block target[i] of k_cache and v_cache, for every i.

    Caches are (blocks, K, P, D); `from` may be the caches themselves, and may lie on another device, where source lies
    too. All sources are read before a target is written; a target named twice holds either. Moves 4·N·K·P·D elements.
    Raises ValueError for caches whose blocks differ in shape or dtype.
    """
    for read, written in ((k_from, k_cache), (v_from, v_cache)):
        # Bytes, because indexing serves no float8; gathered first, so that one transfer crosses between devices.
        blocks_NKPD = read.view(torch.uint8)[source_N].to(written.device)
        written.view(torch.uint8)[target_N.to(written.device)] = blocks_NKPD


@kv_copy_blocks.costs
def cost(k_from: Tensor, source_N: Tensor, target_N: Tensor) -> Cost:
    return Cost(bytes=4 * len(source_N) * k_from[0].nbytes + source_N.nbytes + target_N.nbytes, flops=0)


@kv_copy_blocks.inputs(
    examples=({"N": 1, "K": 1, "P": 4, "D": 16}, {"N": 0, "K": 2, "P": 4, "D": 16}, {"N": 3, "K": 3, "P": 8, "D": 80}),
    shapes={"llama-3-8b 1024 tokens": {"N": 64, "K": 8, "P": 16, "D": 128}},
    sizes={"N": (0, 5), "K": (1, 3), "P": [4, 16], "D": [16, 40]},
)
def make(draw: Draw, N: int, K: int, P: int, D: int) -> tuple[Any, ...]:
    caches = draw(4, N + 2, K, P, D)
    source, target = (draw.permutation(N + 2)[:N] for _ in range(2))
    return *(c.clone() for c in caches), source, target
