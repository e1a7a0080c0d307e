"""A CUDA device that is not there: which provider serves each op at real shapes, and what a capture would hold."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from dry_device import FakeDraw, Seen, device

import seamwise.kernels  # noqa: F401  (registers every contract)
from seamwise.kernels.contract import CONTRACTS

WITH_TRITON = [name for name, c in sorted(CONTRACTS.items()) if any(p.triton for p in c.providers)]
CASES = [(name, label) for name in WITH_TRITON for label in CONTRACTS[name].shapes]
# Inputs that are drawn by looking at values, which a fake tensor has not.
NOT_DRAWN = {"penalize"}


def call(name: str, label: str, seen: Seen) -> str:
    """Call the provider that is chosen; return its name."""
    record = CONTRACTS[name]
    args = record.drawn(FakeDraw(torch.bfloat16), **record.shapes[label])  # type: ignore[arg-type]
    provider = record.choose(args)
    seen.copies.clear(), seen.launches.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an address of a fake tensor is asked for: the group of one rank
        provider.call(*args)
    return provider.name


@pytest.mark.parametrize(("name", "label"), [c for c in CASES if c[0] not in NOT_DRAWN])
def test_a_kernel_serves_and_nothing_is_copied(name: str, label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with device(monkeypatch, compiled=False) as seen:
        provider = call(name, label, seen)
        copies, launches = list(seen.copies), list(seen.launches)
    assert provider != "torch", f"{name} at {label} is served by its meaning on CUDA"
    assert copies == [], "a graph cannot be captured over these"
    assert launches or provider.startswith("torch_"), f"{provider} launched nothing that a recording would hold"


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in WITH_TRITON if n not in NOT_DRAWN])
def test_its_launches_compile(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch of the first shape is specialised on its arguments, as at a GPU's first call, and compiled."""
    with device(monkeypatch, compiled=True) as seen:
        label = next(iter(CONTRACTS[name].shapes))
        call(name, label, seen)


def test_a_copy_in_a_capture_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with device(monkeypatch, compiled=False) as seen:
        there = torch.empty(3, device="cuda")
        torch.ops.aten._to_copy.default(there, device=torch.device("cpu"))
        int(there.sum())
        found: Any = list(seen.copies)
    assert len(found) == 2 and "copies between host and device" in found[0] and "waits" in found[1]
