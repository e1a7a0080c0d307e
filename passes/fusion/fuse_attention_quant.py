"""Quantize in attention's kernel, for the output projection that follows.

before: o = attention(…); q, s = quantize(reshape(o), dtype, group, scale)
after:  q, s = attention_quant(…, dtype, group, scale)
"""

from seamwise.kernels import attention, attention_quant

from .fuse_quant import quant_pass

FUSE_ATTENTION_QUANT = quant_pass("fuse_attention_quant", attention, attention_quant)
