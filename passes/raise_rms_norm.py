"""Name RMSNorm: torch's own op, and the arithmetic that transformers' models spell out.

before: h = x.float(); h = h * rsqrt(mean(h², -1) + eps); y = weight * h.to(x.dtype)
after:  y = rms_norm(x, weight, eps)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seamwise.kernels import rms_norm

from .graph import aten, is_op
from .matcher import HOLE, Match, Pattern
from .rewrite import Pass, pattern_pass

_D = HOLE + 9


def torch_op(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (_D,), weight, eps)


def spelled_out(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def replacement(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(x, weight, eps)


def _one_weight_a_column(match: Match) -> str | None:
    x, weight = (n.meta["val"] for n in match.inputs)
    return None if weight.dim() == 1 else f"weight has shape {tuple(weight.shape)}, wanted ({x.shape[-1]},)"


def _patterns(dtype: torch.dtype) -> list[Pattern]:
    shapes = [(3, _D), (_D,)]
    return [
        Pattern.trace(f, replacement, shapes, dtype, applies=_one_weight_a_column, eps=1.5e-5)
        for f in (torch_op, spelled_out)
    ]


RAISE_RMS_NORM: Pass = pattern_pass(
    "raise_rms_norm",
    patterns=_patterns,
    key=lambda node: is_op(node, aten.rsqrt.default, aten.rms_norm.default),
    expect=lambda s: s.norms,
)
