"""What "auto" means for a model, and what else there is to choose from: device, dtypes, entry, length."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch

from .model_config import ModelConfig

_DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float": torch.float32,
    "half": torch.float16,
}  # fmt: skip
_KV_DTYPES = ("auto", "fp8", "fp8_e4m3")


def choose_device(device: str | torch.device) -> str:
    """Return "cpu" or "cuda[:n]"; "auto" is CUDA where there is one. Raises ValueError for one that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(device)):
        raise ValueError(f"device={device!r}: wanted 'auto', 'cpu', 'cuda' or 'cuda:0'")
    if torch.device(device).type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise ValueError(f"device={str(device)!r}: torch finds no CUDA device; use device='cpu'")
        if (torch.device(device).index or 0) >= count:
            raise ValueError(f"device={str(device)!r}: torch finds {count} CUDA devices, cuda:0 to cuda:{count - 1}")
    return str(device)


def choose_dtype(dtype: Any, config: ModelConfig) -> torch.dtype:
    """Return the dtype of weights and activations; "auto" is the checkpoint's."""
    if dtype == "auto":
        dtype = config.dtype
    if not isinstance(dtype, str):
        return dtype
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r}: wanted 'auto' or one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def choose_kv_dtype(kv_cache_dtype: str, dtype: torch.dtype, scaled: bool) -> torch.dtype:
    """Return the KV cache's dtype; "auto" is float8 where the checkpoint has scales (`scaled`), else the model's."""
    if kv_cache_dtype not in _KV_DTYPES:
        raise ValueError(f"kv_cache_dtype={kv_cache_dtype!r}: wanted one of {', '.join(map(repr, _KV_DTYPES))}")
    return dtype if kv_cache_dtype == "auto" and not scaled else torch.float8_e4m3fn


def choose_entry(entry: str, architecture: str) -> str:
    """Return "own" or "transformers"; "auto" is our definition where there is one."""
    from seamwise.model_defs import has_definition

    own = has_definition(architecture)
    if entry == "auto":
        return "own" if own else "transformers"
    if entry not in ("own", "transformers"):
        raise ValueError(f"entry={entry!r}: wanted 'auto', 'own' or 'transformers'")
    if entry == "own" and not own:
        raise ValueError(f"entry='own': Seamwise has no definition of {architecture}; use entry='transformers'")
    return entry


def entry_of(model_impl: str, entry: str | None = None) -> str:
    """Return the entry that vLLM's option model_impl names. Raises ValueError for another, or beside an entry."""
    entries = {"auto": "auto", "vllm": "auto", "transformers": "transformers"}
    if model_impl not in entries:
        raise ValueError(f"model_impl={model_impl!r}: wanted one of {', '.join(map(repr, entries))}")
    if entry is not None:
        raise ValueError(f"model_impl={model_impl!r} and entry={entry!r} say the same thing; leave one out")
    return entries[model_impl]


def choose_length(max_model_len: int | None, config: ModelConfig, pooled: int | None) -> int:
    """Return the longest request in tokens: what was asked for, else the model's own, at most `pooled` where given."""
    limit = config.longest
    if max_model_len is None:
        max_model_len = min(config.default_len, pooled or config.default_len)
        if config.default_len < limit:
            warnings.warn(
                f"max_model_len is {config.default_len}, the length that the model was trained at before its RoPE"
                f" was scaled; up to {limit} may be asked for, and change what shorter requests give",
                stacklevel=3,
            )
    if type(max_model_len) is not int or not 1 <= max_model_len <= limit:
        raise ValueError(f"max_model_len={max_model_len!r}: wanted 1 to {limit} (what the model's RoPE reaches)")
    return max_model_len
