"""`torch.compile(model, backend="seamwise")`: our named ops and fusions inside any module, graph breaks tolerated.

Dynamo hands over each graph it captured. Its ops are traced to ATen before decomposition, the passes that need no
derived weights run (weights stay the caller's, who may change them), and Inductor compiles the rest; the contracts are
opaque to it and run their own kernels. A graph that writes its inputs or is differentiated is left to Inductor whole.
Source: https://docs.pytorch.org/docs/stable/torch.compiler_custom_backends.html.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from seamwise import passes
from seamwise.compile.check.verify import verify
from seamwise.passes import Report, Structure
from seamwise.passes.graph import sweep, writes

PASSES = (
    passes.RAISE_RMS_NORM,
    passes.RAISE_ROPE,
    passes.RAISE_SWIGLU,
    passes.FUSE_ADD_RMS_NORM,  # after raise_rms_norm: it reads the named op
)
INNER = ("inductor", "aot_eager", "eager")
_last: list[Remark] = []


class Remark:
    """What became of one graph that Dynamo captured: the passes' reports, or why the graph was left as it was."""

    def __init__(self, reports: Sequence[Report] = (), left_alone: str | None = None) -> None:
        self.reports, self.left_alone = list(reports), left_alone

    def matched(self) -> dict[str, int]:
        return {r.name: r.matched for r in self.reports}


def remarks() -> list[Remark]:
    """Return a remark for each graph compiled since the last call."""
    taken, _last[:] = list(_last), []
    return taken


def seamwise(
    module: GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Compile one of Dynamo's graphs. `options={"inner": …}` names who compiles what is left: inductor (the default),
    aot_eager or eager. Raises ValueError for another option or a mode."""
    given = dict(options or {})
    inner = given.pop("inner", "inductor")
    if given or inner not in INNER or mode not in (None, "default"):
        raise ValueError(f"backend seamwise: options={options}, mode={mode!r}; wanted {{'inner': one of {INNER}}}")
    rewritten, remark = _rewritten(module, inputs)
    _last.append(remark)
    compiled: Callable[..., Any] = torch._dynamo.lookup_backend(inner)(rewritten, list(inputs))
    return compiled


def _rewritten(module: GraphModule, inputs: Sequence[Any]) -> tuple[GraphModule, Remark]:
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return module, Remark(left_alone="it is differentiated: the contracts have no gradients; use torch.no_grad()")
    fakes = [n.meta["example_value"] for n in module.graph.find_nodes(op="placeholder")]  # tracing runs the graph
    mode = detect_fake_mode(fakes)
    with patch.object(mode, "allow_non_fake_inputs", True):  # constants of the module are real
        traced = make_fx(module, tracing_mode="symbolic", pre_dispatch=True)(*fakes)
    for node in traced.graph.find_nodes(op="call_function", target=torch.ops.aten.detach_.default):
        node.replace_all_uses_with(node.args[0])  # of a constant: it writes no memory
        traced.graph.erase_node(node)
    if writer := next((n for n in traced.graph.nodes if n.op == "call_function" and writes(n)), None):
        return module, Remark(left_alone=f"{writer.format_node()} writes its argument: rewriting around it is unsound")
    for node, given in zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.meta["weight"] = isinstance(given, torch.nn.Parameter)
    if not any(n.meta["weight"] for n in traced.graph.find_nodes(op="placeholder")):
        return module, Remark(left_alone="it reads no parameters")
    passes.canonicalize(traced)
    reports = [entry.apply(traced, Structure()) for entry in PASSES]
    for report in reports:
        report.expected = None  # a part of a model promises nothing
    sweep(traced)
    verify(traced, "backend seamwise", constants=True)
    traced.recompile()
    return traced, Remark(reports)
