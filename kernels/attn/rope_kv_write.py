"""Turn the step's keys by rotary position embedding and write them with the values into the paged KV cache.

Source: Su et al. 2021, https://arxiv.org/abs/2104.09864; Kwon et al. 2023, https://arxiv.org/abs/2309.06180, section
4.2.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from seamwise.kernels.contract import Cost, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.position.rope import limits_angles, rope

from .attention import CACHES
from .kv_append import append_build, append_cost, kv_append, launch_append, refuses_append


@contract(
    args=CACHES | {"slot_mapping_T": "int64"}, limits=lambda k_TKD, cos_TR: limits_angles(cos_TR, D=k_TKD.shape[-1]),
    seam=True, mutates=("k_cache", "v_cache"), fake=lambda *args: None, reads_values=True,
)  # fmt: skip
def rope_kv_write(
    k_TKD: Tensor, v_TKD: Tensor, cos_TR: Tensor, sin_TR: Tensor, k_cache: Tensor, v_cache: Tensor,
    slot_mapping_T: Tensor, interleaved: bool = False,
) -> None:  # fmt: skip
    """Store rope(k, cos, sin, interleaved) and v as `kv_append` does: one pass instead of a round trip of the keys.

    k and v are (T, K, D), cos and sin (T, R); the caches are `kv_append`'s. Moves 4·T·K·D + 2·T·R elements.
    """
    kv_append.meaning(rope.meaning(k_TKD, cos_TR, sin_TR, interleaved), v_TKD, k_cache, v_cache, slot_mapping_T)


@rope_kv_write.costs
def cost(k_TKD: Tensor, v_TKD: Tensor, cos_TR: Tensor, k_cache: Tensor, slot_mapping_T: Tensor) -> Cost:
    appended = append_cost(k_TKD, v_TKD, k_cache, slot_mapping_T)
    return Cost(bytes=appended.bytes + 2 * cos_TR.nbytes, flops=3 * k_TKD.numel())


@rope_kv_write.inputs(
    examples=(
        {"T": 1, "K": 1, "D": 16, "P": 4}, {"T": 9, "K": 3, "D": 80, "P": 8, "R": 32},
        {"T": 0, "K": 2, "D": 16, "P": 4}, {"T": 5, "K": 2, "D": 16, "P": 4, "interleaved": True},
    ),
    shapes={
        "llama-3-8b prefill": {"T": 4096, "K": 8, "D": 128, "P": 16},
        "llama-3-70b decode": {"T": 64, "K": 8, "D": 128, "P": 16},
    },
    sizes={"T": (0, 9), "K": (1, 4), "D": [16, 40, 64], "P": [4, 16], "R": [0, 8], "interleaved": [False, True]},
)  # fmt: skip
def make(draw: Draw, T: int, K: int, D: int, P: int, R: int = 0, interleaved: bool = False) -> tuple[Any, ...]:
    """`R` columns of a head turn, 0: all."""
    k_TKD, v_TKD, *rest = kv_append.drawn(draw, T=T, K=K, D=D, P=P)
    angles_TR = (draw.uniform(T, (R or D) // 2) * 6.3).repeat(1, 2)
    return k_TKD, v_TKD, angles_TR.cos().to(draw.dtype), angles_TR.sin().to(draw.dtype), *rest, interleaved


rope_kv_write.builds(
    append_build(width, turned=True, interleaved=interleaved)
    for width, interleaved in ((64, True), (128, False), (256, False))
)


@rope_kv_write.provider(
    "triton", devices=("cuda",), triton=True,
    refuses=lambda k_TKD, v_TKD, k_cache, v_cache: refuses_append(k_TKD, v_TKD, k_cache, v_cache),
)  # fmt: skip
def rope_kv_write_triton(
    k_TKD: Tensor, v_TKD: Tensor, cos_TR: Tensor, sin_TR: Tensor, k_cache: Tensor, v_cache: Tensor,
    slot_mapping_T: Tensor, interleaved: bool = False,
) -> None:  # fmt: skip
    launch_append(k_TKD, v_TKD, cos_TR, sin_TR, k_cache, v_cache, slot_mapping_T, interleaved)


@rope_kv_write.provider("composed", devices=("cpu", "cuda"), strided=True, launches=True, composed=True)
def rope_kv_write_composed(
    k_TKD: Tensor, v_TKD: Tensor, cos_TR: Tensor, sin_TR: Tensor, k_cache: Tensor, v_cache: Tensor,
    slot_mapping_T: Tensor, interleaved: bool = False,
) -> None:  # fmt: skip
    """The two ops by their own kernels."""
    kv_append(rope(k_TKD, cos_TR, sin_TR, interleaved), v_TKD, k_cache, v_cache, slot_mapping_T)
