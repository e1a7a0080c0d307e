"""Compile a piece with Inductor, ahead of time, into a file that a pack can hold.

A piece made of kernels, GEMMs and views alone gains nothing from a compiler: its generated code only launches them.
A piece that computes with loose ATen ops (a model's own arithmetic that no contract names) does, and goes here:
each of its contracts is opened to its meaning, so that Inductor may fuse across; an opaque one stays a call.

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
from seamwise.kernels.cpu import tape
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
        and n.target.namespace != "_c10d_functional"
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
        opened = target if record is None or record.opaque else record.meaning
        return super().call_function(opened, args, kwargs)


def compile_piece(module: GraphModule, path: Path) -> Path:
    """Compile a piece for every value of its dynamic sizes and write the package to `path` (*.pt2).

    Tracing assumes that a dynamic size is not 1 (a size of 1 would broadcast); the package is therefore run at 1, and
    at a larger size, against the piece itself. Raises RuntimeError when they disagree.
    """
    dims: dict[str, Any] = {}
    shapes = []
    for node in module.graph.find_nodes(op="placeholder"):
        dynamic = {i: str(s) for i, s in enumerate(value(node).shape) if not isinstance(s, int)}
        shapes.append({i: dims.setdefault(s, Dim(f"d{len(dims)}", min=2, max=1 << 31)) for i, s in dynamic.items()})
    opened = _Opened(module)
    examples = _examples(module, dims, 8)
    with torch.no_grad(), fx_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        exported = torch.export.export(opened, examples, dynamic_shapes=(tuple(shapes),), strict=False)
        # O1 for the wrapper: 4.6 s a piece instead of 22 s, and no slower to call (30-layer Llama's middle piece).
        options = {"aot_inductor.compile_wrapper_opt_level": "O1"}
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=options)
        compiled = load_piece(path)
        for size in (1, 8):
            arguments = _examples(module, dims, size)
            for got, wanted in zip(compiled(*arguments), opened(*arguments), strict=True):
                tolerance = 8 * torch.finfo(wanted.dtype).eps * max(1.0, float(wanted.abs().max()))
                if got.shape != wanted.shape or float((got - wanted).abs().max()) > tolerance:
                    raise RuntimeError(f"Inductor's package of {path.stem} is wrong at size {size}: inductor='never'")
    return path


def load_piece(path: Path) -> Any:
    """Return `run(*inputs) -> tuple` for a compiled package."""
    loader = torch._inductor.aoti_load_package(str(path)).loader
    return lambda *inputs: tape.call(lambda *args: tuple(loader.boxed_run(list(args))), *inputs)


def _examples(module: GraphModule, dims: dict[str, Any], size: int) -> tuple[Tensor, ...]:
    """Return drawn arguments of a piece; the i-th dynamic size is `size` + i, or 1 for all when `size` is 1."""
    generator = torch.Generator().manual_seed(0)
    order = list(dims)
    arguments = []
    for node in module.graph.find_nodes(op="placeholder"):
        fake = value(node)
        sizes = [s if isinstance(s, int) else 1 if size == 1 else size + order.index(str(s)) for s in fake.shape]
        drawn = torch.randn(sizes, generator=generator) if fake.is_floating_point() else torch.zeros(sizes)
        arguments.append(drawn.to(fake.device, fake.dtype))
    return tuple(arguments)
