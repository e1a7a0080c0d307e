"""The dtypes that most C++ kernels serve, by the numbers that they know them by."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def one_dtype(*tensors: Tensor | None) -> str | None:
    """Return why a kernel does not take these tensors together, or None."""
    dtypes = {t.dtype: None for t in tensors if t is not None}
    if len(dtypes) == 1 and dtypes.keys() <= DTYPES.keys():
        return None
    return f"tensors must all be float32 or all bfloat16, got {', '.join(map(str, dtypes))}"
