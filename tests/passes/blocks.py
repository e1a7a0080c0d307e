"""Small modules with the patterns that passes look for, and near misses of them; and how to run passes on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from seamwise.compile.capture import Captured, capture
from seamwise.passes import Pass, Report, Structure, canonicalize


class Spelled(nn.Module):
    """RMSNorm as transformers writes it, with knobs that break the pattern in one place each."""

    def __init__(
        self, width: int, *, eps_inside: bool = True, mean_dim: int = -1, leak: bool = False, family: str = "llama"
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.eps_inside, self.mean_dim, self.leak, self.family = eps_inside, mean_dim, leak, family

    def forward(self, x: Tensor) -> Any:
        wide = x.to(torch.float32)
        variance = wide.pow(2).mean(self.mean_dim, keepdim=True)
        scale = torch.rsqrt(variance + 1e-5) if self.eps_inside else torch.rsqrt(variance) + 1e-5
        match self.family:
            case "llama":
                out = self.weight * (wide * scale).to(x.dtype)
            case "olmo2":
                out = (self.weight * (wide * scale)).to(x.dtype)
            case "gemma":
                out = (wide * scale * (1.0 + self.weight.float())).type_as(x)
        return (out, scale) if self.leak else out


def captured(module: nn.Module, *arguments: Tensor, dims: Sequence[tuple[str | None, ...]] | None = None) -> Captured:
    """Capture a module over example arguments whose first dimension is dynamic, and bring it to canonical spelling."""
    names = list(module.forward.__annotations__)[: len(arguments)]
    spec = dims or [("T", *[None] * (a.dim() - 1)) for a in arguments]
    fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with fake:
        inputs = {n: torch.empty(a.shape, dtype=a.dtype) for n, a in zip(names, arguments, strict=True)}
    result = capture(module, inputs, dict(zip(names, spec, strict=True)))
    canonicalize(result.module)
    return result


def evaluate(graph: Captured, module: nn.Module, *arguments: Tensor) -> Any:
    """Run a captured graph with the module's weights on real arguments."""
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
    weights = [tensors[name].detach() for name in graph.weights.values()]
    graph.module.recompile()
    return graph.module(*weights, *arguments)


def apply(entry: Pass, graph: Captured, **structure: int) -> Report:
    return entry.apply(graph.module, Structure(**structure))


def ops(graph: Captured) -> list[str]:
    return [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]


Check = Callable[[Captured, nn.Module, tuple[Tensor, ...]], None]
