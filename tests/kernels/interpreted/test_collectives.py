"""Kernels that read all ranks' memory, the ranks' buffers being here in one process."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seamwise.kernels.comm.allreduce_rms_norm import sum_norm
from seamwise.kernels.comm.allreduce_rms_norm_quant import sum_norm_quant
from seamwise.kernels.quant.quantize import quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_sums_over_the_peers_addresses(ranks: int) -> None:
    """Each rank's rows lie in a buffer of its own; a share of the rows, and all of them, quantized."""
    generator = torch.Generator().manual_seed(ranks)
    xs = torch.randn(ranks, 8, 40, generator=generator).to(DEVICE)
    residual, weight = torch.randn(8, 40, generator=generator).to(DEVICE), torch.ones(40, device=DEVICE)
    buffers = [x.clone() for x in xs]
    peers = torch.tensor([b.data_ptr() for b in buffers], device=DEVICE)
    exact = xs.double().sum(0) + residual
    rows = 8 // ranks
    for rank in range(ranks):
        first = rank * rows
        normed, total = sum_norm(peers, xs[rank], residual[first : first + rows], weight, 1e-5, first, rows)
        torch.testing.assert_close(total, exact[first : first + rows].float())
        torch.testing.assert_close(normed, F.rms_norm(exact, (40,), eps=1e-5)[first : first + rows].float())
    q, scale, total = sum_norm_quant(peers, xs[0], residual, weight, 1e-5, torch.int8, 16, None)
    wanted, wanted_scale = quantize.meaning(F.rms_norm(total, (40,), eps=1e-5), torch.int8, 16)
    torch.testing.assert_close(total, exact.float())
    torch.testing.assert_close(scale, wanted_scale)
    assert int((q - wanted).abs().max()) <= 1 and int((q != wanted).sum()) <= 2
