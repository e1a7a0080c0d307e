"""Write the step's keys and values into the paged KV cache: the one declared mutation of the graph."""

from __future__ import annotations

from torch import Tensor

from .contract import Cost, contract


@contract(seam=True, mutates=("k_cache", "v_cache"), fake=lambda *args: None)
def kv_append(k_TKD: Tensor, v_TKD: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping_T: Tensor) -> None:
    """Store row t of k and v (T, K, D) at slot_mapping[t] = block · P + offset; a slot of -1 stores nothing.

    Caches are (N blocks, K heads, P tokens a block, D). Moves 4·T·K·D elements.
    """
    block_size = k_cache.shape[2]
    kept = slot_mapping_T >= 0
    slots = slot_mapping_T[kept]
    block, offset = slots // block_size, slots % block_size
    k_cache[block, :, offset] = k_TKD[kept].to(k_cache.dtype)
    v_cache[block, :, offset] = v_TKD[kept].to(v_cache.dtype)


@kv_append.costs
def cost(k_TKD: Tensor, v_TKD: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping_T: Tensor) -> Cost:
    return Cost(bytes=2 * (k_TKD.nbytes + v_TKD.nbytes) + slot_mapping_T.nbytes, flops=0)
