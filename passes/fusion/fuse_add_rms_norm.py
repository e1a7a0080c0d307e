"""Add the residual and normalize the sum in one kernel.

before: s = x + residual; y = rms_norm(s, weight, eps)      s is read again by the next residual sum
after:  y, s = add_rms_norm(x, residual, weight, eps)
Saves one write and one read of s where nothing is fused otherwise: 2·T·D elements a norm.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from seamwise.kernels import add_rms_norm, rms_norm
from seamwise.passes.graph import is_op
from seamwise.passes.matcher import HOLE, Match, Pattern
from seamwise.passes.rewrite import Pass, pattern_pass

_D = HOLE + 9


def pattern(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def replacement(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    both = add_rms_norm(x, residual, weight, eps)
    return operator.getitem(both, 0), operator.getitem(both, 1)


def _same_shape(match: Match) -> str | None:
    x, residual = match.inputs[0].meta["val"], match.inputs[1].meta["val"]
    if x.shape != residual.shape or x.dtype != residual.dtype:
        return f"x is {x.dtype} {tuple(x.shape)}, residual {residual.dtype} {tuple(residual.shape)}: wanted the same"
    return None


def _patterns(dtype: torch.dtype) -> list[Pattern]:
    return [Pattern.trace(pattern, replacement, [(3, _D), (3, _D), (_D,)], dtype, applies=_same_shape, eps=1.5e-5)]


FUSE_ADD_RMS_NORM: Pass = pattern_pass(
    "fuse_add_rms_norm",
    patterns=_patterns,
    key=lambda node: is_op(node, rms_norm.op),
    expect=lambda s, _: s.residual_norms,
)
