"""Quantize in the gated activation's kernel.

before: y = silu_mul(x); q, s = quantize(y, dtype, group, scale)
after:  q, s = silu_mul_quant(x, dtype, group, scale)
"""

from seamwise.kernels import silu_mul, silu_mul_quant

from .fuse_quant import quant_pass

FUSE_SILU_MUL_QUANT = quant_pass("fuse_silu_mul_quant", silu_mul, silu_mul_quant)
