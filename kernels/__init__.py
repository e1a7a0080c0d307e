"""Contracts, one file an op, and the kernels that provide them; each is callable on its own."""

from .add_rms_norm import add_rms_norm
from .attention import attention
from .kv_append import kv_append
from .rms_norm import rms_norm
from .rope import rope
from .silu_mul import silu_mul

__all__ = ["add_rms_norm", "attention", "kv_append", "rms_norm", "rope", "silu_mul"]
