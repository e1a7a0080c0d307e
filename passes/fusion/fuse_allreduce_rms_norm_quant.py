"""Quantize in the op that sums over the ranks, adds the residual and normalizes.

before: y, total = allreduce_rms_norm(x, residual, w, eps, group); q, s = quantize(y, dtype, columns, scale)
after:  q, s, total = allreduce_rms_norm_quant(x, residual, w, eps, group, dtype, columns, scale)
"""

from seamwise.kernels import allreduce_rms_norm, allreduce_rms_norm_quant

from .fuse_quant import quant_pass

FUSE_ALLREDUCE_RMS_NORM_QUANT = quant_pass(
    "fuse_allreduce_rms_norm_quant", allreduce_rms_norm, allreduce_rms_norm_quant, result=0, others=((1, 2),)
)
