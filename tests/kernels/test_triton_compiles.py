"""Every Triton kernel compiles for the GPUs we serve, at each configuration: nothing spills, shared memory fits."""

from __future__ import annotations

import pytest
from triton_check import SHARED_LIMIT, builds_of, usages

import seamwise.kernels  # noqa: F401  (registers every contract)
from seamwise.kernels.contract import CONTRACTS

WITH_TRITON = [name for name, c in sorted(CONTRACTS.items()) if any(p.triton for p in c.providers)]


CASES = [(name, capability) for name in WITH_TRITON for capability in SHARED_LIMIT]


ONE = {80: 0, 90: -1, 100: -1}  # the first build, the last


def check(name: str, capability: int, every: bool) -> None:
    """Compile all builds, or one: each takes half a second to two seconds, and there are 1,700."""
    builds = builds_of(CONTRACTS[name], capability)
    assert builds or capability < 89, "its file names no build"
    one = [builds[ONE[capability]]] if builds else []
    found = list(usages(CONTRACTS[name], capability, builds if every else one))
    # Up to 16 bytes are no pressure: ptxas parks what only the epilogue reads, where that fits one more block. Nor is
    # an array of a library's, beside few registers: triton 3.6's cosine of a large angle keeps 28 bytes of 2 / pi.
    spilling = [u for u in found if u.stack_bytes > 16 and u.registers >= 64]
    assert not spilling, spilling
    too_large = [u for u in found if u.shared_bytes > SHARED_LIMIT[capability]]
    assert not too_large, too_large


@pytest.mark.slow
@pytest.mark.parametrize(("name", "capability"), CASES)
def test_some_builds(name: str, capability: int) -> None:
    check(name, capability, every=False)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "capability"), CASES)
def test_no_spills_and_shared_memory_fits(name: str, capability: int) -> None:
    check(name, capability, every=True)
