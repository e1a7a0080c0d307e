"""Linear layers over weights packed once, for CPUs: the packing is a derived tensor, computed at load.

The packed layout is (⌈N/32⌉ panels, ⌈K/E⌉ words, 32 columns, E elements of a 32-bit word), zero where is no weight.
The reason for packing: an unpacked GEMV reaches a quarter to a third of a CPU's memory bandwidth, a packed one all.

Source: the order of multiplications of VDPBF16PS, Intel 64 and IA-32 manual, https://www.felixcloutier.com/x86/vdpbf16ps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seamwise.kernels.contract import contract
from seamwise.kernels.draw import Draw

PANEL = 32


def packed_shape(out_features: int, in_features: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Return the shape that `pack_linear` gives a weight (N, K)."""
    per_word = max(4 // dtype.itemsize, 1)
    return -(-out_features // PANEL), -(-in_features // per_word), PANEL, per_word


@contract(opaque=True)
def pack_linear(weight_NK: Tensor) -> Tensor:
    """Return the weight (N, K) as panels (⌈N/32⌉, ⌈K/E⌉, 32, E), of the same dtype; E elements make 32 bits."""
    rows, columns = weight_NK.shape
    panels, words, _, per_word = packed_shape(rows, columns, weight_NK.dtype)
    padded = torch.nn.functional.pad(weight_NK, (0, words * per_word - columns, 0, panels * PANEL - rows))
    return padded.reshape(panels, PANEL, words, per_word).permute(0, 2, 1, 3).contiguous()


def limits_packed(packed: Tensor, out_features: int, in_features: int) -> str | None:
    """Return why a tensor is not a packed weight (N, K), or None."""
    wanted = packed_shape(out_features, in_features, packed.dtype)
    if tuple(packed.shape) == wanted:
        return None
    return f"packed is {tuple(packed.shape)}, wanted {wanted} for a weight ({out_features}, {in_features})"


@contract(
    args={"x_TK": "*T K", "packed": "[P W L E]", "bias_N": "out_features"}, opaque=True,
    limits=lambda x_TK, packed, out_features: limits_packed(packed, out_features, x_TK.shape[-1]),
    flops=lambda x_TK, out_features: 2 * x_TK.numel() * out_features,
    fake=lambda x_TK, out_features: x_TK.new_empty((*x_TK.shape[:-1], out_features)),
)  # fmt: skip
def linear_packed(x_TK: Tensor, packed: Tensor, out_features: int, bias_N: Tensor | None = None) -> Tensor:
    """Return x wᵀ + bias: (…, N) in x's dtype, for x (…, K) and w packed by `pack_linear`; sums in float32.

    Moves T·K + N·K + T·N elements and takes 2·T·N·K flops.
    """
    weight_NK = packed.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[:out_features, : x_TK.shape[-1]]
    return torch.nn.functional.linear(x_TK, weight_NK, bias_N)


@pack_linear.inputs(
    examples=({"N": 33, "K": 7}, {"N": 64, "K": 64}, {"N": 1, "K": 1}),
    shapes={"smollm2-135m": {"N": 3072, "K": 576}},
    sizes={"N": (1, 80), "K": (1, 80)},
)
def make_weight(draw: Draw, N: int, K: int) -> tuple[Tensor]:
    return ((draw.normal(N, K) * K**-0.5).to(draw.dtype),)


@linear_packed.inputs(
    examples=({"T": 1, "N": 33, "K": 7}, {"T": 13, "N": 64, "K": 64}, {"T": 0, "N": 32, "K": 16}),
    shapes={
        "smollm2-135m decode": {"T": 1, "N": 3072, "K": 576},
        "smollm2-135m batch": {"T": 32, "N": 3072, "K": 576},
        "smollm2-135m prefill": {"T": 512, "N": 3072, "K": 576},
        "llama-3-8b decode": {"T": 1, "N": 28672, "K": 4096},
    },
    sizes={"T": (0, 20), "N": (1, 80), "K": (1, 200)},
    rows=(0,),
)
def make(draw: Draw, T: int, N: int, K: int) -> tuple[Tensor, Tensor, int]:
    return draw(T, K), pack_linear(*make_weight(draw, N, K)), N
