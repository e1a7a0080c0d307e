"""Quantize in the RMSNorm kernel.

before: y = rms_norm(x, w, eps); q, s = quantize(y, dtype, group, scale)
after:  q, s = rms_norm_quant(x, w, eps, dtype, group, scale)
"""

from seamwise.kernels import rms_norm, rms_norm_quant

from .fuse_quant import quant_pass

FUSE_RMS_NORM_QUANT = quant_pass("fuse_rms_norm_quant", rms_norm, rms_norm_quant)
