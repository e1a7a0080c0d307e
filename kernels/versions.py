"""Every difference between supported versions of torch (2.11 to 2.13) and triton (3.6 to 3.9), in one place."""

from __future__ import annotations

import triton


def triton_interprets() -> bool:
    """Return whether Triton kernels run in the interpreter (TRITON_INTERPRET=1 before import), on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)
