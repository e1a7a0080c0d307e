"""Every Triton kernel compiles for the GPUs we serve, at each configuration: nothing spills, shared memory fits."""

from __future__ import annotations

import pytest

from seamwise.kernels.triton_check import SHARED_LIMIT, usages


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_no_spills_and_shared_memory_fits(capability: int) -> None:
    found = list(usages(capability))
    assert {u.kernel for u in found} == {
        "rms_norm", "add_rms_norm", "rope", "silu_mul", "gather_rows", "kv_append", "attention",
    }  # fmt: skip
    spilling = [u for u in found if u.stack_bytes]
    assert not spilling, spilling
    too_large = [u for u in found if u.shared_bytes > SHARED_LIMIT[capability]]
    assert not too_large, too_large
