"""Every Triton kernel, by its contract's own record: in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from laws import arguments, check, check_rows, refusal

import seamwise.kernels  # noqa: F401  (registers every contract)
from seamwise.kernels.contract import CONTRACTS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNELS = [(n, p.name) for n, c in sorted(CONTRACTS.items()) for p in c.providers if p.triton]


@pytest.mark.parametrize(("name", "provider"), KERNELS)
def test_examples(name: str, provider: str) -> None:
    record, served = CONTRACTS[name], 0
    for sizes in record.examples:
        for dtype in record.dtypes or DTYPES:
            args = record.make_inputs(sizes, dtype=dtype, device=DEVICE)
            if refusal(record, provider, args) is None:
                check_rows(record, provider, args, check(record, provider, args), 0)
                served += 1
    assert served, "it refuses all of its contract's examples"


@pytest.mark.parametrize(("name", "provider"), KERNELS)
@settings(max_examples=12 if DEVICE == "cpu" else 60)
@given(data=st.data())
def test_drawn(name: str, provider: str, data: Any) -> None:
    args, seed = data.draw(arguments(CONTRACTS[name], DTYPES, DEVICE))
    assume(refusal(CONTRACTS[name], provider, args) is None)
    check_rows(CONTRACTS[name], provider, args, check(CONTRACTS[name], provider, args), seed)
