"""`backend="seamwise"` on drawn small modules: what torch promises of each result, against `aot_eager`.

Compared are values, dtypes, devices, strides, requires_grad, which results are one tensor, and which lie in the memory
of others or of an input: every result is written in turn, and the module called again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from seamwise.compile.backend import Backend

# Each line takes a, b (tensors of the lines before) and the parameters w (8,) and W (8, 8).
LINES = [
    "{a}.to({a}.dtype, copy=True)", "{a}.to(torch.float64)", "{a}.to(torch.float32, copy=True)", "{a}.float()",
    "{a}.to('meta').new_zeros(2, 8, device='cpu')", "{a}.to('cpu', copy=True)", "{a}.type_as({b})", "{a}.clone()",
    "{a}.contiguous()", "{a}.detach()", "{a}.view_as({a})", "{a}[:]", "{a}[-9:]", "{a}[:, -20:]", "{a}[:-9]",
    "{a}.expand_as({a})", "{a}.reshape({a}.shape)", "{a}.t().contiguous().t()", "{a}.t().reshape(8, -1).t()",
    "torch.cat([{a}])", "torch.cat([{a}, {a}[:0]])", "torch.cat([{a}[:, :0].double(), {a}], -1)",
    "torch.cat([{a}, {a}[:0].bfloat16()])", "F.dropout({a}, 0.5, False)", "{a}.chunk(2, -1)[1].repeat(1, 2)",
    "{a}.split([1, {n} - 1])[1]", "{a}.view(1, {n}, 2, 4).to(memory_format=torch.channels_last).view({n}, 8)",
    "torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]])", "torch.tensor([[2.0] * 8]).to(torch.float32)",
    "torch.tensor([[3.0] * 8]).detach().view(1, 8)", "torch.ones(2, 8)", "{a} * w", "{a} + {a}", "F.linear({a}, W)",
    "w.detach().expand({n}, 8)", "w.to(torch.float32).expand({n}, 8)", "W.view(8, 8)", "{a}.square()",
    "w * ({a}.float() * torch.rsqrt({a}.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to({a}.dtype)",
    "F.rms_norm({a} + {a}, (8,), w.to({a}.dtype), 1e-5)", "F.silu({a}) * {a}", "F.silu({a}.t()).t() * {a}",
]  # fmt: skip
MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "grad": contextlib.nullcontext,
    "autocast": torch.no_grad,  # and autocast, below
}
INSIDE = ["torch.enable_grad()", "torch.no_grad()", "torch.autocast('cpu', torch.bfloat16)"]


@st.composite
def programs(draw: st.DrawFn) -> str:
    """Draw a function's text: some lines over a growing pool of names, of which some are returned."""
    names, body = ["x", "y"], []
    for i in range(draw(st.integers(1, 5))):
        a, b = (draw(st.sampled_from(names)) for _ in range(2))
        line = draw(st.sampled_from(LINES)).format(a=a, b=b, n=f"{a}.shape[0]")
        body.append(f"t{i} = {line}")
        names.append(f"t{i}")
    if draw(st.integers(0, 3)) == 0:
        body = [f"with {draw(st.sampled_from(INSIDE))}:", *(f"    {line}" for line in body)]
    returned = draw(st.lists(st.sampled_from(names[2:]), min_size=1, max_size=3))
    body.append(f"return ({', '.join(returned)}, x * w)")
    return "def drawn(x, y, w, W):\n" + "".join(f"    {line}\n" for line in body)


def arguments() -> tuple[Any, ...]:
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 8, generator=draw) for n in (4, 2))
    w, W = (nn.Parameter(torch.randn(*shape, generator=draw)) for shape in ((8,), (8, 8)))
    return x, y.t().contiguous().t(), w, W


def observed(text: str, backend: Any, mode: str) -> tuple[Any, list[Tensor]]:
    """Return what a caller can see of the function that this text defines: facts, or the error it raises; values."""
    torch._dynamo.reset()
    space: dict[str, Any] = {"torch": torch, "F": torch.nn.functional}
    exec(text, space)
    given = arguments()
    with MODES[mode](), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        compiled = torch.compile(space["drawn"], backend=backend)
        try:
            results = compiled(*given)
            facts = [(*properties(a), *(a is b for b in (*results, *given))) for a in results]
            seen = values(results)
            for result in results:  # what lies in its memory, and what of the next call depends on it
                with torch.no_grad(), contextlib.suppress(RuntimeError):  # of an expanded one no element is its own
                    result.copy_(torch.full_like(result, 5))
                seen += values((*results, *given))
            return facts, [*seen, *values(compiled(*given))]
        except (RuntimeError, ValueError, IndexError) as error:
            return type(error).__name__, []


def values(tensors: Any) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def properties(x: Tensor) -> tuple[Any, ...]:
    return x.dtype, x.device, x.shape, x.stride(), x.requires_grad, x.is_inference(), isinstance(x, nn.Parameter)


def assert_alike(text: str, mode: str, *, runs: bool = False) -> None:
    ours = Backend("aot_eager")
    (facts, a), (our_facts, b) = observed(text, "aot_eager", mode), observed(text, ours, mode)
    assert our_facts == facts, f"{text}{mode}"
    assert not runs or isinstance(facts, list), facts
    for one, other in zip(b, a, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True, msg=lambda m: f"{text}{mode}: {m}")


AUTOCAST = "with torch.autocast('cpu', torch.bfloat16):\n        a = F.silu(F.linear(x, W)) * F.linear(x, W)\n    "
NO_AUTOCAST = "with torch.autocast('cpu', enabled=False):\n        a = F.linear(x, W)\n    "
GRAD = "with torch.enable_grad():\n        a = x * w\n    "
# What once went wrong: mode, and what is returned together.
FOUND = [
    (
        "no_grad", "return x.to(torch.float32, copy=True), torch.tensor([1.0, 2.0]), x.to('meta').new_zeros(2, device="
        "'cpu'), torch.cat([x]), torch.cat([x, x[:, :0].double()], -1), x[-6:], x[:-6], w.detach(), w.view(8), x * w,"
        "x.view(1, 2, 2, 8).to(memory_format=torch.channels_last)",
    ),
    ("inference", "return w.detach().expand(4, 8), F.dropout(x, 0.5, False), x * w"),
    ("no_grad", f"{GRAD}return a, x * w"),
    ("no_grad", f"{AUTOCAST}return a, x * w"),
    ("autocast", f"{NO_AUTOCAST}return a, F.silu(F.linear(x, W)) * x"),
    ("no_grad", "return F.silu(x.t()) * (x * w).t(), x * w"),
    ("no_grad", "a = F.rms_norm(y + y, (8,), w, 1e-5)\n    return a + a, x * w"),
    ("grad", "return x * w, w.square().detach()"),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "body"), FOUND)
def test_what_was_found_stays_mended(mode: str, body: str) -> None:
    assert_alike(f"def drawn(x, y, w, W):\n    {body}\n", mode, runs=True)


def test_an_assertion_stays() -> None:
    text = "def drawn(x, y, w, W):\n    torch._assert_async((x > 9).all(), 'small')\n    return (x * w,)\n"
    assert observed(text, Backend("aot_eager"), "no_grad")[0] == "RuntimeError"


@pytest.mark.slow
@settings(max_examples=15)
@given(programs(), st.sampled_from([*MODES, "no_grad", "no_grad"]))
def test_a_drawn_module_is_as_aot_eager_gives_it(text: str, mode: str) -> None:
    assert_alike(text, mode)
