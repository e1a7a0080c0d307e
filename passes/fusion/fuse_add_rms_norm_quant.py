"""Quantize in the kernel that adds the residual and normalizes.

before: y, total = add_rms_norm(x, residual, w, eps); q, s = quantize(y, dtype, group, scale)
after:  q, s, total = add_rms_norm_quant(x, residual, w, eps, dtype, group, scale)
"""

from seamwise.kernels import add_rms_norm, add_rms_norm_quant

from .fuse_quant import quant_pass

FUSE_ADD_RMS_NORM_QUANT = quant_pass(
    "fuse_add_rms_norm_quant",
    add_rms_norm,
    add_rms_norm_quant,
    result=0,
    others=((1, 2),),
    # The last feeds the head, that of sparse MLPs the router too; among ranks, fuse_allreduce_rms_norm has the norms.
    expect=lambda s: (
        max(s.residual_norms - 1 - s.sparse_mlps, 0) if s.quantized_activations and not s.all_reduces else 0
    ),
)
