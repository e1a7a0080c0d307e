"""Reading a checkpoint into a plain module, as it is before any compiler: what tests hold equations and formats to."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from seamwise.compile.parameter import parameters_in
from seamwise.runtime.weights.checkpoint import Convert, open_source


def load_weights(
    module: nn.Module, path: Path, *, dtype: torch.dtype, device: str, load_format: str = "auto", seed: int = 0,
    within: str = "", convert: Convert | None = None,
) -> None:  # fmt: skip
    """Give every parameter of a module built on the meta device its value, and move its buffers to the device.

    `within` and `convert` are as in open_source. Peak memory is the model and one tensor. Raises ValueError as
    open_source does; the module is then as it was.
    """
    wanted, buffers = parameters_in(module), dict(module.named_buffers())
    source = open_source(
        path, wanted, dtype=dtype, device=device, load_format=load_format, seed=seed, within=within, convert=convert
    )
    read = {name: source.read(name, dtype=dtype, device=device) for name in wanted}
    for name, parameter in wanted.items():
        value = read[name] if name in buffers else nn.Parameter(read[name], requires_grad=False)
        for each in (name, *parameter.aliases):
            parent, _, leaf = each.rpartition(".")
            setattr(module.get_submodule(parent), leaf, value)
    for owner in module.modules():
        for leaf, buffer in list(owner.named_buffers(recurse=False)):
            setattr(owner, leaf, buffer.to(device))
