"""Every difference between supported versions of torch (2.11 to 2.13) and triton (3.6 to 3.9), in one place."""

from __future__ import annotations

import torch
from torch import Tensor


def storage_users(tensor: Tensor) -> int:
    """Return how many tensors share this tensor's memory, itself included."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)) - 1
