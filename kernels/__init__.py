"""Contracts, one file an op, and the kernels that provide them; each is callable on its own."""

# With the repository's root on sys.path, transformers takes this folder for the Hub's package `kernels`, for which it
# probes; under that name nothing is defined, so that no op is registered twice.
if __name__ != "kernels":
    from .add_rms_norm import add_rms_norm
    from .attention import attention
    from .gather_rows import gather_rows
    from .kv_append import kv_append
    from .linear import linear_packed, pack_linear
    from .quantize import quantize
    from .rms_norm import rms_norm
    from .rope import rope
    from .rope_table import rope_table
    from .silu_mul import silu_mul

    # Providers in files of their own register themselves; nothing is compiled before the first call.
    from . import attention_cpu, attention_triton, linear_cpu, tokenwise_cpu  # noqa: F401  isort: skip

__all__ = [
    "add_rms_norm",
    "attention",
    "gather_rows",
    "kv_append",
    "linear_packed",
    "pack_linear",
    "quantize",
    "rms_norm",
    "rope",
    "rope_table",
    "silu_mul",
]
