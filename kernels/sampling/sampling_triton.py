"""What sampling's Triton kernels share: integers that order as floats do, and log1p.

Source: Herf 2001, http://stereopsis.com/radix.html; Goldberg 1991, https://doi.org/10.1145/103162.103163, theorem 4.
"""

from __future__ import annotations

from seamwise.kernels.lazy_triton import tl, triton


@triton.jit
def to_order(x):
    """Return the int64, within 32 bits, that orders as the float32 x does; -0.0 and 0.0 are equal, as in x."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def from_order(order):
    """Return the float32 of an order."""
    bits = order.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def log1p(x):
    """Return log(1 + x) to float32's relative precision for x > -1: the rounding of 1 + x is divided out again."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * tl.math.div_rn(x, tl.where(y == 1.0, 1.0, y - 1.0)))
