"""Every difference between supported versions of torch (2.11 to 2.13) and triton (3.6 to 3.9), in one place."""

from __future__ import annotations

import torch
import triton
from torch import Tensor


def triton_interprets() -> bool:
    """Return whether Triton kernels run in the interpreter (TRITON_INTERPRET=1 before import), on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def storage_users(tensor: Tensor) -> int:
    """Return how many tensors share this tensor's memory, itself included."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)) - 1
