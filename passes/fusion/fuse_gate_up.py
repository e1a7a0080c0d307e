"""Make the gate and up projections one GEMM.

before: y = cat([linear(x, gate), linear(x, up)], -1)
after:  y = linear(x, cat([gate, up], 0))       the weight cat is a derived tensor: computed at load, not per step
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from seamwise.kernels import gelu_mul, silu_mul
from seamwise.passes.graph import aten, is_op, is_weight
from seamwise.passes.matcher import HOLE, Excuse, Match, Pattern
from seamwise.passes.quantization.quantize_linear import why_apart
from seamwise.passes.rewrite import Pass, pattern_pass

_K, _N = HOLE + 9, HOLE + 13


def plain(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return torch.cat([F.linear(x, gate), F.linear(x, up)], -1)


def biased(x: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor, up_bias: Tensor) -> Tensor:
    return torch.cat([F.linear(x, gate, gate_bias), F.linear(x, up, up_bias)], -1)


def replace_plain(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return aten.linear.default(x, aten.cat.default([gate, up], 0))


def replace_biased(x: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor, up_bias: Tensor) -> Tensor:
    weight, bias = aten.cat.default([gate, up], 0), aten.cat.default([gate_bias, up_bias], 0)
    return aten.linear.default(x, weight, bias)


def _weights(match: Match) -> str | None:
    if (reason := why_apart(match.inputs[1:3])) is not None:
        return Excuse(reason)
    computed = [n.name for n in match.inputs[1:] if not is_weight(n)]
    return (
        f"{', '.join(computed)} is computed in the step; only weights can be joined ahead of it" if computed else None
    )


def _patterns(dtype: torch.dtype) -> list[Pattern]:
    shapes: list[tuple[int, ...]] = [(3, _K), (_N, _K), (_N, _K)]
    return [
        Pattern.trace(plain, replace_plain, shapes, dtype, applies=_weights),
        Pattern.trace(biased, replace_biased, [*shapes, (_N,), (_N,)], dtype, applies=_weights),
    ]


def _unfused(node: Node) -> bool:
    return is_op(node, aten.cat.default) and any(is_op(user, silu_mul.op, gelu_mul.op) for user in node.users)


FUSE_GATE_UP: Pass = pattern_pass("fuse_gate_up", patterns=_patterns, key=_unfused, expect=lambda s, _: s.gate_up_pairs)
