"""Whether a row of a step has the same bits in any batch, which batch_invariant=True asks for.

Our kernels promise that (`rows` of a contract; attention), and tests/kernels/laws.py holds each of them to it. Ops of
torch that compute each element alone or move values keep it. Torch's products and sums choose the order of additions by
the number of rows, so a contract that runs by its meaning promises nothing.
"""

from __future__ import annotations

import re

import torch

from seamwise.compile.derive import resolve_op
from seamwise.compile.program import Program
from seamwise.kernels.contract import contract_of
from seamwise.passes.graph import VIEWS, aten

_MOVES = VIEWS | {
    aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.cat.default, aten.clone.default,
    aten.view.default, aten.split_with_sizes.default, aten.gather.default,
}  # fmt: skip


def unpromised_ops(program: Program) -> list[str]:
    """Return the ops of a program, and the contracts without a kernel, that may give a row other bits in a batch."""
    found = [name for name in sorted(program.providers) if name.endswith((":torch", ":measured"))]
    for name in sorted({*re.findall(r"torch\.ops\.(\w+\.\w+\.\w+)", program.source)}):
        target = resolve_op(name)
        if contract_of(target) is None and target not in _MOVES and torch.Tag.pointwise not in target.tags:
            found.append(name)
    return found


def check_batch_invariant(asked: bool | None, program: Program, device: torch.device) -> None:
    """Raise ValueError for a device or a program that cannot give what was asked for, naming why."""
    if asked is None:
        return
    if not asked:
        raise ValueError("batch_invariant=False: no kernel here is faster for giving it up; leave it out")
    if device.type != "cpu":
        raise ValueError(f"batch_invariant=True: on {device} products are chosen by the number of rows; leave it out")
    if unpromised := unpromised_ops(program):
        raise ValueError(
            f"batch_invariant=True: {', '.join(unpromised)} may give a row other bits in a larger batch; leave it out"
        )
