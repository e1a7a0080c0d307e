"""`torch.compile(model, backend="seamwise")`: our named ops and fusions inside any module, graph breaks tolerated.

Dynamo hands over each graph it captured. Its ops are traced to ATen before decomposition, the passes that need no
derived weights run (weights stay the caller's, who may change them), and Inductor compiles the rest; the contracts are
opaque to it and run their own kernels. A graph that writes its inputs, is differentiated or autocast is left to
Inductor whole.
Source: https://docs.pytorch.org/docs/stable/torch.compiler_custom_backends.html.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.amp.autocast_mode import _enter_autocast
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import guard_scalar, statically_known_true

from seamwise import passes
from seamwise.compile.check.verify import verify
from seamwise.passes import Report, Structure
from seamwise.passes.graph import infer, sweep, value, writes

PASSES = (
    passes.RAISE_RMS_NORM,
    passes.RAISE_ROPE,
    passes.RAISE_SWIGLU,
    passes.FUSE_ADD_RMS_NORM,  # after raise_rms_norm: it reads the named op
)
INNER = ("inductor", "aot_eager", "eager")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Remark:
    """What became of one graph that Dynamo captured: the passes' reports, or why the graph was left as it was."""

    reports: tuple[Report, ...] = ()
    left_alone: str | None = None

    def matched(self) -> dict[str, int]:
        return {r.name: r.matched for r in self.reports}


class Backend:
    """What `torch.compile(backend=…)` takes, remembering in `remarks` what became of each graph.

    inner  who compiles what is left: "inductor", "aot_eager" or "eager"
    """

    def __init__(self, inner: str = "inductor") -> None:
        if inner not in INNER:
            raise ValueError(f"backend seamwise: inner={inner!r}; wanted one of {', '.join(INNER)}")
        self.inner = inner
        self.remarks: list[Remark] = []

    def __call__(self, module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one of Dynamo's graphs."""
        with _real_constants(module):
            rewritten, remark = _rewritten(module, inputs)
        self.remarks.append(remark)
        _LOG.info("%s", remark.left_alone or remark.matched())
        compiled: Callable[..., Any] = torch._dynamo.lookup_backend(self.inner)(rewritten, list(inputs))
        return compiled


def seamwise(
    module: GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Compile one of Dynamo's graphs, by the backend's name. `options={"inner": …}` as Backend's; its remarks are
    logged. Raises ValueError for another option or a mode."""
    given = dict(options or {})
    inner = given.pop("inner", "inductor")
    if given or mode not in (None, "default"):
        raise ValueError(f"backend seamwise: options={options}, mode={mode!r}; wanted {{'inner': one of {INNER}}}")
    return Backend(inner)(module, inputs)


def _rewritten(module: GraphModule, inputs: Sequence[Any]) -> tuple[GraphModule, Remark]:
    if not any(isinstance(x, torch.nn.Parameter) for x in inputs):
        return module, Remark(left_alone="it reads no parameters")
    if (reason := _changing_mode(module, inputs)) is not None:
        return module, Remark(left_alone=reason)
    _fix_numbers(module)
    traced = _traced(module)
    for node in traced.graph.find_nodes(op="call_function", target=torch.ops.aten.detach_.default):
        node.replace_all_uses_with(node.args[0])  # of a constant: it writes no memory
        traced.graph.erase_node(node)
    if writer := next((n for n in traced.graph.nodes if n.op == "call_function" and writes(n)), None):
        return module, Remark(left_alone=f"{writer.format_node()} writes its argument: rewriting around it is unsound")
    for node, given in zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.meta["weight"] = isinstance(given, torch.nn.Parameter)
        node.meta["requires_grad"] = getattr(given, "requires_grad", False)
    before = _results(traced)
    passes.canonicalize(traced)
    reports = [entry.apply(traced, Structure()) for entry in PASSES]
    for report in reports:
        report.expected = None  # a part of a model promises nothing
    sweep(traced)
    for node in traced.graph.nodes:
        if node.op == "call_function" and any(isinstance(value(n), Tensor) for n in node.all_input_nodes):
            infer(node)  # what reads a kernel's rows may follow their strides
    if not all(map(_laid_out_alike, before, _results(traced))):
        return module, Remark(left_alone="its results would have other strides: kernels write rows, torch as it reads")
    verify(traced, "backend seamwise", constants=True)
    traced.recompile()
    return traced, Remark(reports=tuple(reports))


def _fakes(module: GraphModule) -> list[Any]:
    """Return what Dynamo says that the graph is given."""
    return [n.meta.get("example_value") for n in module.graph.find_nodes(op="placeholder")]


def _traced(module: GraphModule) -> GraphModule:
    return make_fx(module, tracing_mode="symbolic", pre_dispatch=True)(*_fakes(module))


@contextmanager
def _real_constants(module: GraphModule) -> Iterator[None]:
    """Let ops on fake tensors take the module's constants, which are real, where values are traced and inferred."""
    mode = detect_fake_mode(_fakes(module))
    if mode is None:
        yield
        return
    allowed, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True
    try:
        yield
    finally:
        mode.allow_non_fake_inputs = allowed


def _fix_numbers(module: GraphModule) -> None:
    """Make numbers of a dynamic graph (an eps) constants, as passes read them, with a guard on each."""
    for node in list(module.graph.find_nodes(op="call_method", target="item")):
        number = node.meta["example_value"]
        if isinstance(number, torch.SymFloat) and number.node.has_hint():
            node.replace_all_uses_with(guard_scalar(number))
            module.graph.erase_node(node)
    module.recompile()


def _changing_mode(module: GraphModule, inputs: Sequence[Any]) -> str | None:
    """Return which mode of torch's, around the graph or entered in it, changes what its ops give, or None."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    calls = [n for n in module.graph.nodes if n.op == "call_function"]
    grad = torch.is_grad_enabled() or any(n.target is torch._C._set_grad_enabled and n.args[0] for n in calls)
    if grad and any(x.requires_grad for x in tensors):
        return "it is differentiated: the contracts have no gradients; use torch.no_grad()"
    autocast = any(torch.is_autocast_enabled(x.device.type) for x in tensors)
    if autocast or any(n.target is _enter_autocast and n.args[2] for n in calls):
        return "autocast chooses its ops' dtypes as they run; give the model the dtype itself"
    return None


def _results(module: GraphModule) -> list[Any]:
    (output,) = module.graph.find_nodes(op="output")
    return [value(n) if isinstance(n, torch.fx.Node) else n for n in torch.utils._pytree.tree_leaves(output.args[0])]


def _laid_out_alike(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor):
        return True
    return all(statically_known_true(x == y) for x, y in zip(a.stride(), b.stride(), strict=True))
