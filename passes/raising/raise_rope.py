"""Name rotary position embedding (neox halves), with tokens first as our models write it or heads first as
transformers' models do.

before: y = x * cos + cat(-x[..., D/2:], x[..., :D/2]) * sin
after:  y = rope(x, cos, sin)
Also where only the first columns turn (Phi-3), and where cos and sin are float32 and the sum is rounded to x's dtype
(OLMo 2), which is what `rope` does with them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seamwise.kernels import rope
from seamwise.passes.graph import aten, is_op
from seamwise.passes.matcher import HOLE, Match, Pattern
from seamwise.passes.rewrite import Pass, pattern_pass

_HALF = HOLE + 13


def _rotate(x: Tensor) -> Tensor:
    return torch.cat((-x[..., _HALF:], x[..., :_HALF]), dim=-1)


def tokens_first(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    return x_THD * cos_TD.unsqueeze(-2) + _rotate(x_THD) * sin_TD.unsqueeze(-2)


def heads_first(x_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    return x_BHTD * cos_BTD.unsqueeze(-3) + _rotate(x_BHTD) * sin_BTD.unsqueeze(-3)


def heads_first_wide(x_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    return heads_first(x_BHTD, cos_BTD, sin_BTD).to(x_BHTD.dtype)


def heads_first_partial(x_BHTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    turned, rest = x_BHTD[..., : 2 * _HALF], x_BHTD[..., 2 * _HALF :]
    return torch.cat((heads_first(turned, cos_BTR, sin_BTR), rest), dim=-1)


def tokens_first_partial(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    turned, rest = x_THD[..., : 2 * _HALF], x_THD[..., 2 * _HALF :]
    return torch.cat((tokens_first(turned, cos_TR, sin_TR), rest), dim=-1)


def replace_tokens_first(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rope(x, cos, sin)


def replace_heads_first(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rows = aten.transpose.int(aten.select.int(x, 0, 0), -3, -2)
    rotated = rope(rows, aten.select.int(cos, 0, 0), aten.select.int(sin, 0, 0))
    return aten.unsqueeze.default(aten.transpose.int(rotated, -3, -2), 0)


def _fits(rank: int, batched: bool, partial: bool = False) -> Callable[[Match], str | None]:
    def applies(match: Match) -> str | None:
        x, cos, sin = (n.meta["val"] for n in match.inputs)
        half = match.sizes.get(_HALF)
        if x.dim() != rank or cos.dim() != rank - 1 or cos.shape != sin.shape:
            return (
                f"x {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}: wanted ranks {rank}, {rank - 1}"
            )
        if batched and not (x.shape[0] == 1 and cos.shape[0] == 1):
            return f"batch is {x.shape[0]}, wanted 1 (tokens of all requests are concatenated)"
        turned = match.sizes.get(2 * _HALF) if partial else x.shape[-1]
        if half is None or turned != 2 * half or cos.shape[-1] != turned:
            what = "the first columns" if partial else "the whole head"
            return f"halves are cut at {half}, wanted {turned} / 2 (rotation of {what})"
        return None

    return applies


def _patterns(dtype: torch.dtype) -> list[Pattern]:
    D = 2 * _HALF
    tokens, heads = [(3, 2, D), (3, D), (3, D)], [(1, 2, 3, D), (1, 3, D), (1, 3, D)]
    tokens_part, heads_part = [(3, 2, D + HOLE + 31), *tokens[1:]], [(1, 2, 3, D + HOLE + 31), *heads[1:]]
    wide = [dtype, torch.float32, torch.float32]
    tokens_some, heads_some = _fits(3, False, partial=True), _fits(4, True, partial=True)
    return [
        # Rotations of a part come first: the rest of their pattern is rotation of the whole.
        Pattern.trace(tokens_first_partial, replace_tokens_first, tokens_part, dtype, applies=tokens_some),
        Pattern.trace(heads_first_partial, replace_heads_first, heads_part, dtype, applies=heads_some),
        Pattern.trace(tokens_first, replace_tokens_first, tokens, dtype, applies=_fits(3, False)),
        Pattern.trace(heads_first, replace_heads_first, heads, dtype, applies=_fits(4, True)),
        Pattern.trace(heads_first_wide, replace_heads_first, heads, wide, applies=_fits(4, True)),
    ]


RAISE_ROPE: Pass = pattern_pass(
    "raise_rope", patterns=_patterns, key=lambda node: is_op(node, aten.neg.default), expect=lambda s, _: s.rotations
)
