"""These tests need Triton's interpreter, which is chosen before triton is imported, or a GPU."""

from __future__ import annotations

import torch

from seamwise.kernels.versions import triton_interprets

collect_ignore_glob = [] if triton_interprets() or torch.cuda.is_available() else ["test_*.py"]
