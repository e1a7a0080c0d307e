"""Reading a checkpoint into a plain module, as it is before any compiler: what tests hold equations and formats to."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from seamwise.runtime.weights.checkpoint import Convert, kept_dtypes, open_source, parameter_shapes


def load_weights(
    module: nn.Module, path: Path, *, dtype: torch.dtype, device: str, load_format: str = "auto", seed: int = 0,
    within: str = "", convert: Convert | None = None,
) -> None:  # fmt: skip
    """Give every parameter of a module built on the meta device its value, and move its buffers to the device.

    `within` and `convert` are as in open_source. Peak memory is the model and one tensor. Raises ValueError as
    open_source does; the module is then as it was.
    """
    shapes, tied = parameter_shapes(module)
    buffers = kept_dtypes(module)
    source = open_source(
        path, shapes, tied, dtype=dtype, device=device, load_format=load_format, seed=seed, kept_dtypes=buffers,
        within=within, convert=convert,
    )  # fmt: skip
    loaded = {}
    for name in shapes:
        read = source.read(name, dtype=dtype, device=device)
        loaded[name] = read if name in buffers else nn.Parameter(read, requires_grad=False)
    for name in (*shapes, *tied):
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, loaded[tied.get(name, name)])
    for owner in module.modules():
        for leaf, buffer in list(owner.named_buffers(recurse=False)):
            setattr(owner, leaf, buffer.to(device))
