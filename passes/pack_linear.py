"""(placeholder)"""

from .rewrite import Pass

PACK_LINEAR = Pass(name="pack_linear", rewrite=lambda m, r: None)
