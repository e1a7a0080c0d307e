"""Name RMSNorm: torch's own op, and the arithmetic that transformers' models spell out.

before: h = x.float(); h = h * rsqrt(mean(h², -1) + eps); y = weight * h.to(x.dtype)
after:  y = rms_norm(x, weight, eps)
before: the same h; y = (h * (1.0 + weight.float())).to(x.dtype)      Gemma; OLMo 2 without the 1
after:  y = rms_norm(x, 1.0 + weight.float(), eps)      what is made of weights alone is computed at load
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seamwise.kernels import rms_norm
from seamwise.passes.graph import aten, is_op
from seamwise.passes.matcher import HOLE, Pattern
from seamwise.passes.rewrite import Pass, pattern_pass

_D = HOLE + 9


def torch_op(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (_D,), weight, eps)


def spelled_out(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rounded_last(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * weight).to(x.dtype)


def replacement(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(x, weight, eps)


def replace_rounded_last(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(x, aten.to.dtype(weight, torch.float32), eps)


def _patterns(dtype: torch.dtype) -> list[Pattern]:
    shapes = [(3, _D), (_D,)]
    spellings = (
        (torch_op, replacement),
        (spelled_out, replacement),  # before rounded_last, which is the same where the model is in float32
        (rounded_last, replace_rounded_last),
    )
    return [Pattern.trace(p, r, shapes, dtype, eps=1.5e-5) for p, r in spellings]


RAISE_RMS_NORM: Pass = pattern_pass(
    "raise_rms_norm",
    patterns=_patterns,
    key=lambda node: is_op(node, aten.rsqrt.default, aten.rms_norm.default),
    expect=lambda s, _: s.norms,
)
