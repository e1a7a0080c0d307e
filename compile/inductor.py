"""Compile a piece with Inductor, ahead of time, into a file that a pack can hold.

A piece made of kernels, GEMMs and views alone gains nothing from a compiler: its generated code only launches them.
A piece that computes with loose ATen ops (a model's own arithmetic that no contract names) does, and goes here:
each of its contracts is opened to its meaning, so that Inductor may fuse across.

Source: AOTInductor, https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html. The package is a zip of a
shared object, its C++ source and JSON: no pickle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental import _config as fx_config

from seamwise.kernels.contract import contract_of
from seamwise.passes.graph import VIEWS, aten, value

# Views cost nothing, a GEMM and a gather run a library kernel either way: none of these is a reason to compile.
_FREE = VIEWS | {
    aten.linear.default, aten.mm.default, aten.addmm.default,
    aten.embedding.default, aten.index.Tensor, aten.index_select.default,
}  # fmt: skip


def loose_ops(module: GraphModule) -> list[Node]:
    """Return the nodes of a piece that compute with ATen ops no contract names and no library kernel serves."""
    return [
        n
        for n in module.graph.nodes
        if n.op == "call_function"
        and isinstance(n.target, torch._ops.OpOverload)
        and contract_of(n.target) is None
        and n.target not in _FREE
    ]


class _Opened(torch.nn.Module):
    """A piece with every contract replaced by its meaning."""

    def __init__(self, piece: GraphModule) -> None:
        super().__init__()
        self.piece = piece

    def forward(self, *arguments: Tensor) -> Any:
        return _OpenContracts(self.piece).run(*arguments)


class _OpenContracts(Interpreter):
    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        record = contract_of(target)
        return super().call_function(target if record is None else record.meaning, args, kwargs)


def compile_piece(module: GraphModule, path: Path) -> Path:
    """Compile a piece for every value of its dynamic sizes and write the package to `path` (*.pt2)."""
    examples: list[Tensor] = []
    shapes: list[dict[int, Any]] = []
    dims: dict[str, Any] = {}
    for node in module.graph.find_nodes(op="placeholder"):
        fake = value(node)
        dynamic = {i: s for i, s in enumerate(fake.shape) if not isinstance(s, int)}
        shapes.append(
            {i: dims.setdefault(str(s), Dim(f"d{len(dims)}", min=1, max=1 << 31)) for i, s in dynamic.items()}
        )
        sizes = [8 + list(dims).index(str(s)) if i in dynamic else s for i, s in enumerate(fake.shape)]
        examples.append(_example(fake, sizes))
    with torch.no_grad(), fx_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        exported = torch.export.export(_Opened(module), tuple(examples), dynamic_shapes=(tuple(shapes),), strict=False)
        # O1 for the wrapper: 4.6 s a piece instead of 22 s, and no slower to call (30-layer Llama's middle piece).
        options = {"aot_inductor.compile_wrapper_opt_level": "O1"}
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=options)
    return path


def load_piece(path: Path) -> Any:
    """Return `run(*inputs) -> tuple` for a compiled package."""
    loader = torch._inductor.aoti_load_package(str(path)).loader
    return lambda *inputs: tuple(loader.boxed_run(list(inputs)))


def _example(fake: Tensor, sizes: list[int]) -> Tensor:
    """Return a tensor with the fake's dtype, device and stride order at concrete sizes."""
    order = sorted(range(fake.dim()), key=lambda i: _hint(fake.stride(i)), reverse=True)
    dense = torch.zeros([sizes[i] for i in order], dtype=fake.dtype, device=fake.device)
    return dense.permute([order.index(i) for i in range(fake.dim())])


def _hint(stride: Any) -> int:
    return stride if isinstance(stride, int) else int(stride.node.hint)
