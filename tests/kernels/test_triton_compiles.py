"""Every Triton kernel compiles for the GPUs we serve, at each configuration: nothing spills, shared memory fits."""

from __future__ import annotations

import pytest

import seamwise.kernels  # noqa: F401  (registers every contract)
from seamwise.kernels.contract import CONTRACTS
from seamwise.kernels.triton_check import SHARED_LIMIT, usages

WITH_TRITON = [name for name, c in sorted(CONTRACTS.items()) if any(p.triton for p in c.providers)]


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("name", WITH_TRITON)
def test_no_spills_and_shared_memory_fits(name: str, capability: int) -> None:
    builds = [b for dtype in ("bf16", "fp32") for b in CONTRACTS[name].triton_builds(dtype)]
    found = list(usages(CONTRACTS[name], capability))
    assert builds and len(found) == sum(b.min_capability <= capability for b in builds)
    # Up to 16 bytes are no pressure: ptxas parks what only the epilogue reads, where that fits one more block.
    spilling = [u for u in found if u.stack_bytes > 16]
    assert not spilling, spilling
    too_large = [u for u in found if u.shared_bytes > SHARED_LIMIT[capability]]
    assert not too_large, too_large
