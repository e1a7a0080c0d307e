"""Triton kernels against their meaning in float64 and against others.

Here is what a contract's record cannot say (test_contracts.py has the rest): agreement with others' implementations,
refusals.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seamwise.kernels import rms_norm, rope

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rows(tokens: int, width: int, dtype: torch.dtype, seed: int, *, padding: int = 0) -> Tensor:
    """Draw (tokens, width), a view of a wider matrix whose other columns are NaN."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.full((tokens, width + padding), torch.nan)
    matrix[:, :width] = torch.randn(tokens, width, generator=generator) * 3
    return matrix.to(DEVICE, dtype)[:, :width]


def test_norm_agrees_with_torch() -> None:
    x, weight = rows(5, 200, torch.float32, 0), rows(1, 200, torch.float32, 1)[0]
    torch.testing.assert_close(rms_norm.run("triton", x, weight, 1e-6), F.rms_norm(x, (200,), weight, 1e-6))


def test_rope_agrees_with_transformers() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x, cos, sin = (
        rows(7, 4 * 16, torch.float32, 0).unflatten(1, (4, 16)),
        *(rows(7, 16, torch.float32, s) for s in (1, 2)),
    )
    theirs, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos[None], sin[None])
    torch.testing.assert_close(rope.run("triton", x, cos, sin), theirs[0].transpose(0, 1))


def test_what_a_kernel_cannot_serve_is_refused_with_its_reason() -> None:
    with pytest.raises(ValueError, match="rms_norm: weight has 3 elements but x has 4 columns"):
        rms_norm.run("triton", rows(2, 4, torch.float32, 0), torch.ones(3, device=DEVICE), 1e-5)
