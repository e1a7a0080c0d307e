"""Which recorder a device has."""

from __future__ import annotations

import torch

from .cuda_graphs import CUDAGraphRecorder
from .recorder import CPURecorder, Recorder


def recorder_for(device: torch.device) -> Recorder:
    """Return a recorder of calls on a device: CUDA graphs, or the CPU's tape."""
    return CUDAGraphRecorder(device) if device.type == "cuda" else CPURecorder()
