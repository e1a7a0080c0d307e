"""What every provider of every contract must keep, drawn by hypothesis from the contract's own record."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seamwise.kernels.contract import Contract
from seamwise.kernels.cpu import instruction_set

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NARROW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
ROUNDINGS = 4 * torch.finfo(torch.float32).eps  # of the largest, in sums that float32 holds
# Hopper's float8 products keep 14 bits of a sum (DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 3.3.2), and
# which instruction multiplies depends on the tile: mma.sync, through float16, to 16 rows, wgmma above. Kernels go over
# to float32 every 128 columns, four such instructions, each of which drops up to one last bit, always toward zero.
ROUNDINGS_OF_FLOAT8 = 2.0**-12
FLOAT8_PRODUCTS = ("scaled_linear", "grouped_scaled_linear")


@contextmanager
def using(name: str) -> Iterator[None]:
    """Use an instruction set within the context, and after it what was used before."""
    before = instruction_set.current()
    instruction_set.use(name)
    try:
        yield
    finally:
        instruction_set.use(before)


def on_instruction_sets(*others: str) -> Any:
    """Return a fixture that runs each test of a module as the run was asked to, then with each of `others`."""

    @pytest.fixture(autouse=True, params=["as asked", *others])
    def code(request: pytest.FixtureRequest) -> Iterator[None]:
        asked = request.param == "as asked"
        if not asked and request.param not in instruction_set.runnable():
            pytest.skip(f"this machine does not run {request.param}")
        with using(instruction_set.current() if asked else request.param):
            yield

    return code


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [] if result is None else list(result)


def widen(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of the float64 reference; a plain float dtype asked for becomes float64 too."""

    def wide(a: Any) -> Any:
        if isinstance(a, Tensor):
            return a.double() if a.dtype in FLOATS else a.clone()
        return torch.float64 if isinstance(a, torch.dtype) and a in FLOATS else a

    return tuple(map(wide, args))


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what torch.empty returns with NaN (integers: their largest), so that nothing unwritten goes unseen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def call(contract: Contract, provider: str | None, args: tuple[Any, ...]) -> list[Tensor]:
    """Run a provider (None: the meaning) on copies; return its results, then the arguments that it may write."""
    copies = [a.clone() if isinstance(a, Tensor) and contract.mutates else a for a in args]
    with poisoned():
        result = contract.meaning(*copies) if provider is None else contract.run(provider, *copies)
    names = [a.name for a in contract.op._schema.arguments]
    return tensors(result) + [copies[names.index(name)] for name in contract.mutates]


class Rounding(TorchDispatchMode):
    """Keeps what was rounded last to a narrow dtype: `unrounded`, by its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.unrounded: dict[tuple[int, ...], Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        to_float8 = func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") in NARROW[:2]
        if to_float8 or func is torch.ops.aten.round.default:
            self.unrounded[tuple(args[0].shape)] = args[0]
        return func(*args, **(kwargs or {}))


def check(contract: Contract, provider: str, args: tuple[Any, ...]) -> list[Tensor]:
    """Hold |kernel - f64| <= 2 (|meaning at the dtype - f64| + eps max|f64|) for every result; return the results.

    Four roundings of the largest in float32 are added: a meaning that is right by luck leaves no room for another order
    of the same sum. Where terms of both signs cancel, the largest is what they add up to without (`magnitudes`).
    So is one of 1 in float64: where logits cancel, a kernel may be nearer than the float64 meaning. Products of float8
    on a GPU have a coarser one (`roundings`).

    Quantized results may be one step off in 2 % of their elements; other integers are
    exact. Ties do not count, what lies within 8 eps of the middle between its two neighbours: a scale that differs in
    its last bit moves all of them, and where values have few bits, as those of one float8 key, they are an eighth.
    """
    results = call(contract, provider, args)
    with Rounding() as rounding:
        same = call(contract, None, args)
    exact = call(contract, None, widen(args))
    assert len(results) == len(same)
    for i, (got, near, far) in enumerate(zip(results, same, exact, strict=True)):
        assert got.shape == near.shape and got.dtype == near.dtype, (got.shape, near.shape, got.dtype, near.dtype)
        if not got.numel():
            continue
        if got.dtype in NARROW:
            check_narrow(got, near, rounding.unrounded.get(tuple(got.shape)))
        elif got.dtype in FLOATS and far.shape == got.shape:  # a layout of 32-bit words has a shape of its own
            check_budget(
                got.double(), near.double(), far.double(), torch.finfo(got.dtype).eps,
                lambda i=i: magnitudes(contract, args)[i], roundings(contract, args),
            )  # fmt: skip
        else:
            assert torch.equal(got, near)
    return results


def check_narrow(got: Tensor, near: Tensor, unrounded: Tensor | None = None) -> None:
    a, b = got.double(), near.double()
    step = (0.125 * b.abs()).clamp(min=2.0**-9) if got.dtype.is_floating_point else torch.ones_like(b)
    assert bool(((a - b).abs() <= step).all()), (a - b).abs().max()
    differ = a != b
    if unrounded is not None:
        between = unrounded.double() - (a + b) / 2
        differ &= between.abs() > 8 * torch.finfo(torch.float32).eps * unrounded.double().abs()
    assert int(differ.sum()) <= 2 + 0.02 * a.numel(), f"{int(differ.sum())} of {a.numel()} elements differ"


def multiplies_float8(contract: Contract, args: tuple[Any, ...]) -> bool:
    """Return whether a GPU multiplies float8 here."""
    x = args[0]
    return contract.name in FLOAT8_PRODUCTS and x.dtype in NARROW[:2] and x.device.type == "cuda"


def roundings(contract: Contract, args: tuple[Any, ...]) -> float:
    """Return how much of the largest the sums of these products may be off."""
    return ROUNDINGS_OF_FLOAT8 if multiplies_float8(contract, args) else ROUNDINGS


def check_budget(
    got: Tensor, near: Tensor, far: Tensor, eps: float, terms: Callable[[], Tensor], rounding: float = ROUNDINGS
) -> None:
    """terms: what the results would be if nothing cancelled; asked for only where the results alone leave no room."""
    finite = far.isfinite()
    assert torch.equal(got[~finite], far[~finite].to(got.dtype)), "infinities differ"
    if not bool(finite.any()):
        return
    got, near, far = got[finite], near[finite], far[finite]
    assert not bool(got.isnan().any()), "NaN: something was read or left unwritten"
    largest, error = far.abs().max(), (got - far).abs().max()
    room = 2 * ((near - far).abs().max() + eps * largest) + torch.finfo(torch.float64).eps
    if error > room + rounding * largest:
        largest = torch.cat((terms()[finite].abs(), far.abs())).nan_to_num(0, 0, 0).max()
    budget = room + rounding * largest
    assert error <= budget, (float(error), float(budget))


def magnitudes(contract: Contract, args: tuple[Any, ...]) -> list[Tensor]:
    """Return the float64 meaning of the arguments' magnitudes: of a sum of products, the sum of their magnitudes."""

    def positive(a: Any) -> Any:
        if not isinstance(a, Tensor) or a.dtype not in (*FLOATS, *NARROW):
            return a
        return a.abs() if a.dtype in FLOATS else a.float().abs().clamp(max=127).to(a.dtype)

    return call(contract, None, tuple(map(positive, widen(args))))


def check_rows(contract: Contract, provider: str, args: tuple[Any, ...], whole: list[Tensor], seed: int) -> None:
    """One row alone gives its row of the whole, in bits; permuted rows permute the results.

    Where a GPU multiplies float8, the row stands in the place of every other, so that the tile is the same.
    """
    count = whole[0].shape[0]
    if not contract.rows or not count:
        return

    def at(index: Any) -> tuple[Any, ...]:
        return tuple(a[index] if i in contract.rows and a is not None else a for i, a in enumerate(args))

    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(whole[0].device)
    row = int(order[0])
    alone = torch.full_like(order, row) if multiplies_float8(contract, args) else slice(row, row + 1)
    for index in (alone, order):
        if provider == "torch" or refusal(contract, provider, at(index)) is not None:
            continue
        for part, full in zip(call(contract, provider, at(index)), whole, strict=True):
            assert torch.equal(_bits(part), _bits(full[index])), f"{index}: differs from the whole"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def refusal(contract: Contract, provider: str, args: tuple[Any, ...]) -> str | None:
    """Return why a provider refuses these arguments, or None."""
    record = next(p for p in contract.providers if p.name == provider)
    return contract.why_not(record, args)


def loosened(args: tuple[Any, ...], rows: tuple[int, ...]) -> tuple[Any, ...]:
    """Return the arguments with the float rows as views of wider matrices whose other columns are NaN."""

    def loose(i: int, a: Any) -> Any:
        if i not in rows or not isinstance(a, Tensor) or a.dim() < 2 or a.dtype not in FLOATS:
            return a
        wide = torch.full((a.shape[0], math.prod(a.shape[1:]) + 8), torch.nan, dtype=a.dtype, device=a.device)
        view = wide[:, 4:-4].unflatten(1, a.shape[1:]) if a.dim() > 2 else wide[:, 4:-4]
        return view.copy_(a)

    return tuple(loose(i, a) for i, a in enumerate(args))


def scaled(args: tuple[Any, ...], rows: tuple[int, ...], factor: float) -> tuple[Any, ...]:
    """Return the arguments with the float rows multiplied."""
    return tuple(
        a * factor if i in rows and isinstance(a, Tensor) and a.dtype in FLOATS else a for i, a in enumerate(args)
    )


@st.composite
def arguments(draw: st.DrawFn, contract: Contract, dtypes: tuple[torch.dtype, ...], device: str) -> Any:
    """Draw (args, seed) of a contract: sizes, dtype, values, their magnitude, and whether rows are strided."""
    sizes = {
        name: draw(st.integers(*choice) if isinstance(choice, tuple) else st.sampled_from(choice))
        for name, choice in contract.sizes.items()
    }
    dtype, seed = draw(st.sampled_from(contract.dtypes or dtypes)), draw(st.integers(0, 2**31 - 1))
    args = contract.make_inputs(sizes, dtype=dtype, device=device, seed=seed)
    args = scaled(args, contract.rows, draw(st.sampled_from([1.0, 1.0, 1e-3, 30.0])))
    return loosened(args, contract.rows) if draw(st.booleans()) else args, seed
