"""Every Triton kernel, by its contract's own record: in the interpreter on a CPU, compiled on a GPU.

The examples also go to the providers of libraries, whose tiles follow the batch: rows alone differ in bits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from laws import arguments, check, check_rows, loosened, refusal

import seamwise.kernels  # noqa: F401  (registers every contract)
from seamwise.kernels.contract import CONTRACTS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PROVIDERS = [(n, p) for n, c in sorted(CONTRACTS.items()) for p in c.providers]
KERNELS = [(n, p.name) for n, p in PROVIDERS if p.triton]
LIBRARIES = [(n, p.name) for n, p in PROVIDERS if not p.triton and {"cuda", DEVICE} <= set(p.devices or ())]


@pytest.mark.parametrize(("name", "provider"), [*KERNELS, *LIBRARIES])
def test_examples(name: str, provider: str) -> None:
    record, served = CONTRACTS[name], 0
    dtypes = record.dtypes or DTYPES
    for i, sizes in enumerate(record.examples):
        turned = (*dtypes[i % len(dtypes) :], *dtypes[: i % len(dtypes)])
        for dtype in turned:
            args = record.make_inputs(sizes, dtype=dtype, device=DEVICE)
            if refusal(record, provider, args) is not None:
                continue
            results = check(record, provider, args)
            if (name, provider) in KERNELS and dtype == turned[0]:
                check_rows(record, provider, args, results, 0)
                strided = loosened(args, tuple(range(len(args))))
                if refusal(record, provider, strided) is None:
                    check(record, provider, strided)
            served += 1
            if DEVICE == "cpu" and i > 0:
                break  # the first example in every dtype, the others in one that is served: the interpreter is slow
    assert served, "it refuses all of its contract's examples"


@pytest.mark.parametrize(("name", "provider"), KERNELS)
@settings(max_examples=12 if DEVICE == "cpu" else 60)
@given(data=st.data())
def test_drawn(name: str, provider: str, data: Any) -> None:
    args, seed = data.draw(arguments(CONTRACTS[name], DTYPES, DEVICE))
    assume(refusal(CONTRACTS[name], provider, args) is None)
    check_rows(CONTRACTS[name], provider, args, check(CONTRACTS[name], provider, args), seed)
