"""Name the gated activation of Llama-like MLPs.

before: y = silu(gate) * up
after:  y = silu_mul(cat([gate, up], -1))      the cat disappears when fuse_gate_up makes gate and up one GEMM
Source: Shazeer 2020, https://arxiv.org/abs/2002.05202.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seamwise.kernels import silu_mul

from .graph import aten, is_op
from .matcher import Match, Pattern
from .rewrite import Pass, pattern_pass


def pattern(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def replacement(gate: Tensor, up: Tensor) -> Tensor:
    return silu_mul(aten.cat.default([gate, up], -1))


def _same_shape(match: Match) -> str | None:
    gate, up = (n.meta["val"] for n in match.inputs)
    return (
        None if gate.shape == up.shape else f"gate is {tuple(gate.shape)}, up is {tuple(up.shape)}: wanted equal shapes"
    )


def _patterns(dtype: torch.dtype) -> list[Pattern]:
    return [Pattern.trace(pattern, replacement, [(3, 5), (3, 5)], dtype, applies=_same_shape)]


RAISE_SWIGLU: Pass = pattern_pass(
    "raise_swiglu", patterns=_patterns, key=lambda node: is_op(node, aten.silu.default), expect=lambda s: s.gated_mlps
)
