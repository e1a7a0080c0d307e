"""Every contract, by its own record: its examples, its drawn inputs, its op under opcheck and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from laws import arguments, call, check, check_rows, refusal, tensors
from torch._subclasses.fake_tensor import FakeTensorMode

import seamwise.kernels  # noqa: F401  (registers every contract)
from seamwise.kernels.contract import CONTRACTS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = sorted(CONTRACTS)
CPU_KERNELS = [(n, p.name) for n in NAMES for p in CONTRACTS[n].providers if p.devices == ("cpu",)]


@pytest.mark.parametrize("name", NAMES)
def test_the_record_is_whole(name: str) -> None:
    record = CONTRACTS[name]
    assert record.examples and record.shapes and record.sizes, "it registers examples, shapes and sizes"
    assert "http" in (__import__("sys").modules[record.meaning.__module__].__doc__ or ""), "its file names a source"
    for dtype in ("bf16", "fp32"):
        record.triton_builds(dtype)  # asserts that Triton kernels come with builds


@pytest.mark.parametrize("name", NAMES)
def test_examples(name: str) -> None:
    """The meaning agrees with itself in float64, costs what it says, and registers as a sound op."""
    record = CONTRACTS[name]
    for i, sizes in enumerate(record.examples):
        for dtype in DTYPES:
            args = record.make_inputs(sizes, dtype=dtype, device="cpu")
            check(record, "torch", args)
            cost = record.cost(*args)
            assert cost.bytes >= 0 and cost.flops >= 0
            traced = dtype == DTYPES[i % len(DTYPES)]  # a tenth of a second each
            if traced or i == 0:
                torch.library.opcheck(record.op, args, test_utils=opchecks(args, traced))


def opchecks(args: tuple[Any, ...], traced: bool) -> tuple[str, ...]:
    """Return opcheck's default checks; that of the schema compares arguments by allclose, which float8 has not."""
    float8 = any(isinstance(a, torch.Tensor) and a.dtype == torch.float8_e4m3fn for a in args)
    rest = ("test_autograd_registration", "test_faketensor", *(["test_aot_dispatch_dynamic"] if traced else []))
    return rest if float8 else ("test_schema", *rest)


@pytest.mark.parametrize("name", NAMES)
def test_through_torch_compile(name: str) -> None:
    record = CONTRACTS[name]
    sizes = record.examples[-1]
    args = record.make_inputs(sizes, dtype=torch.float32, device="cpu")
    torch._dynamo.reset()  # every contract's lambda is one code object, whose recompilations are limited
    compiled = torch.compile(lambda *given: record.op(*given), backend="aot_eager", fullgraph=True)
    copies = [a.clone() if isinstance(a, torch.Tensor) and record.mutates else a for a in args]
    result = tensors(compiled(*copies))
    for got, wanted in zip(result, call(record, record.choose(args).name, args), strict=False):
        assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize(("name", "provider"), CPU_KERNELS)
@settings(max_examples=40)
@given(data=st.data())
def test_cpu_kernels(name: str, provider: str, data: Any) -> None:
    args, seed = data.draw(arguments(CONTRACTS[name], DTYPES, "cpu"))
    assume(refusal(CONTRACTS[name], provider, args) is None)
    check_rows(CONTRACTS[name], provider, args, check(CONTRACTS[name], provider, args), seed)


def strided(x: torch.Tensor) -> torch.Tensor:
    """Return the same values with the last two dimensions' strides exchanged."""
    return x.mT.contiguous().mT


# Rows whatever they are given: what collectives give, a sampler outside graphs, and what is packed at load.
GIVES_ROWS = {"ep_dispatch", "ep_dispatch_quant", "pack_linear", "reduce_scatter_rms_norm", "truncate_logits"}


@pytest.mark.parametrize("name", [n for n in NAMES if n not in GIVES_ROWS])
def test_inferred_results_have_the_real_ones_strides(name: str) -> None:
    record = CONTRACTS[name]
    args = record.make_inputs(record.examples[-1], dtype=torch.float32, device="cpu")
    for i in [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.dim() > 1]:
        given = (*args[:i], strided(args[i]), *args[i + 1 :])
        try:
            real = tensors(record.op(*given))
        except ValueError:  # it takes rows only
            continue
        with FakeTensorMode() as mode:
            inferred = tensors(record.op(*[mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in given]))
        for a, b in zip(real, inferred, strict=True):
            assert a.shape == b.shape and (not a.numel() or a.stride() == b.stride()), (a.stride(), b.stride())
