"""`torch.compile(model, backend="seamwise")` on others' models: equal to eager, with our ops inside."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from seamwise.compile.backend import Backend

SMALL = {
    "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 64, "pad_token_id": 0,
}  # fmt: skip
# architecture -> how often each pass matches, for one request (rope rotates a batch of 1 only)
MODELS = {
    "Llama": {"raise_rms_norm": 5, "raise_rope": 4, "raise_swiglu": 2, "fuse_add_rms_norm": 4},
    "Qwen2": {"raise_rms_norm": 5, "raise_rope": 4, "raise_swiglu": 2, "fuse_add_rms_norm": 4},
    "Qwen3": {"raise_rms_norm": 9, "raise_rope": 4, "raise_swiglu": 2, "fuse_add_rms_norm": 4},
    "Mistral": {"raise_rms_norm": 5, "raise_rope": 4, "raise_swiglu": 2, "fuse_add_rms_norm": 4},
    "Olmo2": {"raise_rms_norm": 9, "raise_rope": 4, "raise_swiglu": 2, "fuse_add_rms_norm": 1},
    "StableLm": {"raise_rms_norm": 0, "raise_rope": 4, "raise_swiglu": 2, "fuse_add_rms_norm": 0},  # layer norms
}


def build(name: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL)
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    return model


def compiled(model: Any, backend: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, **options)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_models(name: str) -> None:
    model = build(name)
    ids = torch.randint(1, 128, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        eager, ours = model(ids).logits, compiled(model, backend := Backend("aot_eager"))(ids).logits
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)
    found: Counter[str] = Counter()
    for remark in backend.remarks:
        found.update(remark.matched())
    assert {k: found[k] for k in MODELS[name]} == MODELS[name]


class Norm(nn.Module):
    """An RMSNorm whose eps is a number of the module, as transformers' are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(16)), 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_dynamic_sizes_and_numbers_compile(fullgraph: bool) -> None:
    """Dynamo gives eps as an input then, which a pass could not read; another eps is another graph."""
    model, backend = Norm(), Backend("aot_eager")
    function = compiled(model, backend, dynamic=True, fullgraph=fullgraph)
    with torch.no_grad():
        for rows, eps in ((3, 1e-5), (5, 1e-5), (5, 0.5)):
            x, model.eps = torch.randn(rows, 16), eps
            torch.testing.assert_close(function(x), model(x))
    assert {r.matched()["raise_rms_norm"] for r in backend.remarks} == {1}


@pytest.mark.slow
def test_with_inductor_inside_and_other_sizes() -> None:
    model = build("Llama")
    function = compiled(model, "seamwise")
    with torch.no_grad():
        for tokens in (9, 5, 12):
            ids = torch.randint(1, 128, (1, tokens))
            torch.testing.assert_close(function(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


class Breaks(nn.Module):
    """Two RMSNorms with a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16))

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        torch._dynamo.graph_break()
        return self.norm(x)


def test_graph_breaks_are_tolerated() -> None:
    model, x = Breaks(), torch.randn(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, backend := Backend("eager"))(x), model(x))
    assert [r.matched()["raise_rms_norm"] for r in backend.remarks] == [1, 1]


def test_what_is_differentiated_or_written_is_left_alone_and_says_so() -> None:
    model, x = Breaks(), torch.randn(3, 16)
    backend = Backend("aot_eager")
    compiled(model, backend)(x).sum().backward()
    grad, model.weight.grad = model.weight.grad, None
    model(x).sum().backward()
    torch.testing.assert_close(grad, model.weight.grad)
    assert all("differentiated" in (r.left_alone or "") for r in backend.remarks)
    assert len(backend.remarks) == 2

    def writes(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x * weight

    backend, ones = Backend("aot_eager"), nn.Parameter(torch.ones(4))
    with torch.no_grad():
        a, b = torch.zeros(4), torch.zeros(4)
        torch.testing.assert_close(compiled(writes, backend)(a, ones), writes(b, ones))
    assert torch.equal(a, b) and "writes its argument" in (backend.remarks[0].left_alone or "")


def test_unknown_options_are_refused() -> None:
    for options in ({"inner": "fast"}, {"outer": "inductor"}):
        with pytest.raises(Exception, match="inner"), torch.no_grad():
            compiled(Breaks(), "seamwise", options=options)(torch.randn(3, 16))


def test_by_name_its_remarks_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="seamwise.compile.backend"), torch.no_grad():
        compiled(Breaks(), "seamwise", options={"inner": "eager"})(torch.randn(3, 16))
    logged = [r.message for r in caplog.records if r.name == "seamwise.compile.backend"]
    assert len(logged) == 2 and all("'raise_rms_norm': 1" in line for line in logged)


class Rotation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(1))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        turned = torch.cat((-x[..., 4:], x[..., :4]), -1)
        return (x * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)) * self.gain


class WeightedNorm(nn.Module):
    def __init__(self, size: int, step: int = 1) -> None:
        super().__init__()
        self.weight, self.step = nn.Parameter(torch.rand(size)), step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight[:: self.step] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("module", "shapes", "raised"),
    [
        (WeightedNorm(1), [(5, 64)], 0), (WeightedNorm(64), [(5, 1)], 0), (WeightedNorm(64), [(64,)], 1),
        (WeightedNorm(64), [(5, 64)], 1), (WeightedNorm(64, 2), [(5, 32)], 1), (WeightedNorm(64), [(2, 3, 64)], 1),
        (Rotation(), [(1, 3, 8), (5, 8), (5, 8)], 0), (Rotation(), [(5, 3, 8), (1, 8), (1, 8)], 0),
        (Rotation(), [(5, 3, 8), (5, 8), (5, 8)], 1),
    ],
    ids=str,
)  # fmt: skip
def test_shapes_that_broadcast_are_left_as_they_are(
    module: nn.Module, shapes: list[tuple[int, ...]], raised: int, dynamic: bool
) -> None:
    inputs, backend = [torch.randn(shape) for shape in shapes], Backend("aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(module, backend, dynamic=dynamic)(*inputs), module(*inputs))
    matched = [r.matched() for r in backend.remarks]
    assert sum(m["raise_rms_norm"] + m["raise_rope"] for m in matched) == raised
