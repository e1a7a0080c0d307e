"""Every pass: fires where it should, keeps the result, explains a near miss, and finds nothing the second time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from blocks import Spelled, apply, captured, evaluate, ops
from torch import Tensor, nn

from seamwise import passes
from seamwise.passes import Pass

DTYPES = [torch.float32, torch.bfloat16]


class Rope(nn.Module):
    def __init__(self, *, half: int = 8, minus: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))  # gives the graph its dtype
        self.half, self.minus = half, minus

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        low, high = x[..., : self.half], x[..., self.half :]
        turned = torch.cat((-high, low) if self.minus else (high, -low), -1)
        return (x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)) * self.scale


class HeadsFirstRope(nn.Module):
    def __init__(self, *, wide: bool = False) -> None:
        super().__init__()
        self.scale, self.wide = nn.Parameter(torch.ones(1)), wide

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x, cos, sin = x.transpose(0, 1).unsqueeze(0), cos.unsqueeze(0), sin.unsqueeze(0)
        if self.wide:
            cos, sin = cos.float(), sin.float()
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return (x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)).to(x.dtype) * self.scale


class PartialRope(nn.Module):
    """Rotates the first columns of each head, as Phi-3 does."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, kept = x[..., :8], x[..., 8:]
        low, high = turned.chunk(2, -1)
        turned = turned * cos[:, :8].unsqueeze(1) + torch.cat((-high, low), -1) * sin[:, :8].unsqueeze(1)
        return torch.cat((turned, kept), -1) * self.scale


class MLP(nn.Module):
    def __init__(
        self, *, bias: bool = False, gelu: bool = False, shared_up: bool = False, approximate: str = "none"
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(16, 24, bias=bias), nn.Linear(16, 24, bias=bias)
        self.gelu, self.shared_up, self.approximate = gelu, shared_up, approximate

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        gate = self.gate_proj(x)
        return (F.gelu(gate, approximate=self.approximate) if self.gelu else F.silu(gate)) * (
            gate if self.shared_up else up
        )


class FusedMLP(nn.Module):
    """Phi-3's: gate and up are one matrix, cut in the middle (or after one column, which torch broadcasts)."""

    def __init__(self, *, cut: int = 24, up_first: bool = False) -> None:
        super().__init__()
        self.gate_up_proj, self.cut, self.up_first = nn.Linear(16, 48, bias=False), cut, up_first

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up_proj(x)
        gate, up = both[:, : self.cut], both[:, self.cut :]
        return gate * F.silu(up) if self.up_first else up * F.silu(gate)


class GemmaBlock(nn.Module):
    """A sum that is normalized with a weight made after it in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Spelled(16, family="gemma")

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return self.norm(total), total


class QKV(nn.Module):
    def __init__(self, *, biases: tuple[bool, bool, bool] = (False, False, False)) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 32, bias=biases[0])
        self.k_proj, self.v_proj = (nn.Linear(16, 8, bias=b) for b in biases[1:])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class AddNorm(nn.Module):
    def __init__(self, *, scaled: bool = False) -> None:
        super().__init__()
        self.weight, self.scaled = nn.Parameter(torch.rand(16) + 0.5), scaled

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.add(x, residual, alpha=2) if self.scaled else x + residual
        return F.rms_norm(total, (16,), self.weight, 1e-5), total


def rows(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def case(name: str, dtype: torch.dtype) -> tuple[list[Pass], nn.Module, tuple[Tensor, ...], dict[str, int]]:
    """Return the passes to run (the last is under test), a module, its arguments and the promise."""
    x, wide = rows(5, 16, dtype=dtype), rows(5, 3, 16, dtype=dtype)
    cos, sin = rows(5, 16, dtype=dtype), rows(5, 16, dtype=dtype)
    norm, swiglu = passes.RAISE_RMS_NORM, passes.RAISE_SWIGLU
    cases: dict[str, tuple[list[Pass], nn.Module, tuple[Tensor, ...], dict[str, int]]] = {
        "spelled norm": ([norm], Spelled(16), (x,), {"norms": 1}),
        "gemma norm": ([norm], Spelled(16, family="gemma"), (x,), {"norms": 1}),
        "olmo2 norm": ([norm], Spelled(16, family="olmo2"), (x,), {"norms": 1}),
        "torch norm": ([norm], AddNorm(), (x, x), {"norms": 1}),
        "rope": ([passes.RAISE_ROPE], Rope(), (wide, cos, sin), {"rotations": 1}),
        "heads first rope": ([passes.RAISE_ROPE], HeadsFirstRope(), (wide, cos, sin), {"rotations": 1}),
        "wide rope": ([passes.RAISE_ROPE], HeadsFirstRope(wide=True), (wide, cos, sin), {"rotations": 1}),
        "partial rope": ([passes.RAISE_ROPE], PartialRope(), (wide, cos, sin), {"rotations": 1}),
        "fused swiglu": ([swiglu], FusedMLP(), (x,), {"gated_mlps": 1}),
        "fused swiglu, up first": ([swiglu], FusedMLP(up_first=True), (x,), {"gated_mlps": 1}),
        "geglu": ([swiglu], MLP(gelu=True), (x,), {"gated_mlps": 1}),
        "geglu by tanh": ([swiglu], MLP(gelu=True, approximate="tanh"), (x,), {"gated_mlps": 1}),
        "geglu gate up": ([swiglu, passes.FUSE_GATE_UP], MLP(gelu=True), (x,), {"gate_up_pairs": 1}),
        "swiglu": ([swiglu], MLP(), (x,), {"gated_mlps": 1}),
        "add norm": ([norm, passes.FUSE_ADD_RMS_NORM], AddNorm(), (x, x), {"residual_norms": 1}),
        "gemma add norm": ([norm, passes.FUSE_ADD_RMS_NORM], GemmaBlock(), (x, x), {"residual_norms": 1}),
        "gate up": ([swiglu, passes.FUSE_GATE_UP], MLP(), (x,), {"gate_up_pairs": 1}),
        "biased gate up": ([swiglu, passes.FUSE_GATE_UP], MLP(bias=True), (x,), {"gate_up_pairs": 1}),
        "qkv": ([passes.FUSE_QKV], QKV(), (x,), {"attentions": 1}),
        "biased qkv": ([passes.FUSE_QKV], QKV(biases=(True, True, True)), (x,), {"attentions": 1}),
    }
    chain, module, arguments, promise = cases[name]
    return chain, module.to(dtype), arguments, promise


FIRING = [
    "spelled norm", "gemma norm", "olmo2 norm", "torch norm", "rope", "heads first rope", "wide rope", "partial rope",
    "swiglu", "fused swiglu", "fused swiglu, up first", "geglu", "geglu by tanh",
    "geglu gate up", "add norm", "gemma add norm", "gate up", "biased gate up", "qkv", "biased qkv",
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FIRING)
def test_pass_fires_keeps_the_result_and_is_idempotent(name: str, dtype: torch.dtype) -> None:
    chain, module, arguments, promise = case(name, dtype)
    graph = captured(module, *arguments)
    for entry in chain[:-1]:
        apply(entry, graph)
    before = evaluate(graph, module, *arguments)
    report = apply(chain[-1], graph, **promise)
    assert report.matched == report.expected == 1, report
    after = evaluate(graph, module, *arguments)
    exact = evaluate_in_float64(name)
    for b, a, e in zip(flat(before), flat(after), flat(exact), strict=True):
        budget = 2 * ((b.double() - e).abs().max() + torch.finfo(dtype).eps * e.abs().max())
        assert (a.double() - e).abs().max() <= budget
    assert apply(chain[-1], graph, **promise).matched == 0


def evaluate_in_float64(name: str) -> object:
    """The module itself, in float64, on the arguments at hand (bf16 and fp32 draw the same numbers up to rounding)."""
    _, module, arguments, _ = case(name, evaluate_in_float64.dtype)  # type: ignore[attr-defined]
    with torch.no_grad():
        return module.double()(*(a.double() for a in arguments))


@pytest.fixture(autouse=True)
def _dtype_of_the_case(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    evaluate_in_float64.dtype = getattr(request.node, "callspec", None) and request.node.callspec.params.get("dtype")  # type: ignore[attr-defined]


def flat(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("chain", "module", "ranks", "reason"),
    [
        ([passes.RAISE_RMS_NORM], Spelled(16, eps_inside=False), 2, "pattern has aten.rsqrt"),
        ([passes.RAISE_RMS_NORM], Spelled(16, mean_dim=0), 2, "aten.mean.dim"),
        ([passes.RAISE_RMS_NORM], Spelled(16, leak=True), 2, "extra user"),
        ([passes.RAISE_ROPE], Rope(half=4), 3, "cut at 4"),
        ([passes.RAISE_ROPE], Rope(minus=False), 3, "pattern has"),
        ([passes.RAISE_SWIGLU], FusedMLP(cut=1), 2, "wanted equal shapes"),
        ([passes.FUSE_QKV], QKV(biases=(True, False, True)), 2, "bias"),
        ([passes.RAISE_RMS_NORM, passes.FUSE_ADD_RMS_NORM], AddNorm(scaled=True), 2, "alpha"),
    ],
    ids=[
        "eps outside",
        "mean over tokens",
        "extra user",
        "wrong half",
        "wrong sign",
        "gate of one column",
        "one bias missing",
        "scaled add",
    ],
)
def test_near_miss_does_not_fire_and_says_why(chain: list[Pass], module: nn.Module, ranks: int, reason: str) -> None:
    x = rows(*((5, 16) if ranks == 2 else (5, 3, 16)), dtype=torch.float32)
    extra = {Rope: (x[:, 0], x[:, 1]), AddNorm: (x,)}.get(type(module), ())
    graph = captured(module, x, *extra)
    for entry in chain:
        report = apply(entry, graph)
    assert report.matched == 0
    assert len(report.misses) == 1 and reason in report.misses[0].reason, report.misses
    assert "seamwise" not in " ".join(ops(graph)) or len(chain) > 1


def test_halves_of_one_matrix_are_not_joined_again() -> None:
    graph = captured(FusedMLP(), rows(5, 16, dtype=torch.float32))
    assert apply(passes.RAISE_SWIGLU, graph).matched == 1
    assert not [name for name in ops(graph) if "cat" in name or "slice" in name]


def test_gelu_keeps_its_kind() -> None:
    for kind in ("none", "tanh"):
        graph = captured(MLP(gelu=True, approximate=kind), rows(5, 16, dtype=torch.float32))
        apply(passes.RAISE_SWIGLU, graph)
        assert [n.args[1] for n in graph.graph.nodes if "gelu_mul" in str(n.target)] == [kind]


def test_views_of_joined_linears_know_their_strides() -> None:
    """A provider is chosen by them: a kernel for contiguous rows must not be given columns of a wider matrix."""

    class Heads(QKV):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
            return tuple(y.view(-1, y.shape[-1] // 4, 4).transpose(0, 1) for y in super().forward(x))

    graph = captured(Heads(), rows(5, 16, dtype=torch.float32))
    apply(passes.FUSE_QKV, graph)
    (output,) = graph.graph.find_nodes(op="output")
    assert [n.meta["val"].stride() for n in output.args[0]] == [(4, 48, 1)] * 3


@pytest.mark.parametrize("family", ["gemma", "olmo2"])
def test_a_norm_that_rounds_last_keeps_its_weight_in_float32(family: str) -> None:
    graph = captured(Spelled(16, family=family).bfloat16(), rows(5, 16, dtype=torch.bfloat16))
    apply(passes.RAISE_RMS_NORM, graph)
    weights = [n.args[1].meta["val"].dtype for n in graph.graph.nodes if "seamwise.rms_norm" in str(n.target)]  # type: ignore[union-attr]
    assert weights == [torch.float32]


def test_eps_is_read_from_the_graph() -> None:
    graph = captured(AddNorm(), rows(5, 16, dtype=torch.float32), rows(5, 16, dtype=torch.float32))
    for node in graph.graph.nodes:
        if "rms_norm" in str(node.target):
            node.args = (*node.args[:3], 0.125)
    assert apply(passes.RAISE_RMS_NORM, graph).matched == 1
    assert [n.args[2] for n in graph.graph.nodes if "seamwise.rms_norm" in str(n.target)] == [0.125]


def test_miss_names_the_module() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Spelled(16), Spelled(16, eps_inside=False)])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](x))

    report = apply(passes.RAISE_RMS_NORM, captured(Outer(), rows(5, 16, dtype=torch.float32)))
    assert report.matched == 1
    assert [m.module for m in report.misses] == ["layers.1"]
