"""Name the gated activations of Llama-like and Gemma-like MLPs.

before: y = silu(gate) * up
after:  y = silu_mul(cat([gate, up], -1))      the cat disappears when fuse_gate_up makes gate and up one GEMM
before: y = silu(x[..., :I]) * x[..., I:]
after:  y = silu_mul(x)
The same for gelu, by tanh or exact, and gelu_mul.
Source: Shazeer 2020, https://arxiv.org/abs/2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from seamwise.kernels import gelu_mul, silu_mul
from seamwise.passes.graph import aten, is_op
from seamwise.passes.matcher import HOLE, Match, Pattern
from seamwise.passes.rewrite import Pass, pattern_pass

_I = HOLE + 9


def _same_shape(match: Match) -> str | None:
    gate, up = (n.meta["val"] for n in match.inputs)
    return (
        None if gate.shape == up.shape else f"gate is {tuple(gate.shape)}, up is {tuple(up.shape)}: wanted equal shapes"
    )


def _cut_in_the_middle(match: Match) -> str | None:
    cut, width = match.sizes[_I], match.inputs[0].meta["val"].shape[-1]
    return None if 2 * cut == width else f"gate has {cut} of {width} columns, wanted half of them"


def _gated(act: Callable[[Tensor], Tensor], fused: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[Pattern]:
    def halves(x: Tensor) -> Tensor:
        return act(x[..., :_I]) * x[..., _I:]

    def apart(gate: Tensor, up: Tensor) -> Tensor:
        return act(gate) * up

    def join(gate: Tensor, up: Tensor) -> Tensor:
        return fused(aten.cat.default([gate, up], -1))

    return [
        Pattern.trace(halves, fused, [(3, 2 * _I)], dtype, applies=_cut_in_the_middle),
        Pattern.trace(apart, join, [(3, 5), (3, 5)], dtype, applies=_same_shape),  # would match halves too
    ]


def _patterns(dtype: torch.dtype) -> list[Pattern]:
    found = _gated(F.silu, silu_mul, dtype)
    for kind in ("tanh", "none"):
        found += _gated(partial(F.gelu, approximate=kind), partial(_gelu_mul, kind), dtype)
    return found


def _gelu_mul(kind: str, x: Tensor) -> Tensor:
    return gelu_mul(x, kind)


RAISE_SWIGLU: Pass = pattern_pass(
    "raise_swiglu",
    patterns=_patterns,
    key=lambda node: is_op(node, aten.silu.default, aten.gelu.default),
    expect=lambda s, _: s.gated_mlps,
)
