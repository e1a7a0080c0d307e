"""Rotary position embedding as a configuration asks for it: how fast each pair of columns turns.

In float32 step by step, as transformers computes it: at position 8000 one ulp of a speed is already 5e-4 radians.
Source: Su et al. 2021, https://arxiv.org/abs/2104.09864; YaRN: Peng et al. 2023, https://arxiv.org/abs/2309.00071;
LongRoPE: Ding et al. 2024, https://arxiv.org/abs/2402.13753.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .hf_config import Reader


@dataclass(frozen=True, slots=True)
class Rope:
    """speeds of the R/2 pairs in radians a position, exact in float32; cosines and sines are multiplied by scaling."""

    speeds: tuple[float, ...]
    scaling: float = 1.0

    @classmethod
    def from_hf(cls, read: Reader, E: int) -> Rope:
        """Read what transformers 5 keeps in rope_parameters and transformers 4 in rope_theta and rope_scaling.

        With a partial_rotary_factor the first columns of a head turn, in every family, as in vLLM: transformers'
        Llama leaves it out of account with its default RoPE. Raises ValueError for what is not served.
        """
        rope = _parameters(read)
        kind = rope.choice("rope_type", tuple(_KINDS), "default")
        share = rope.positive("partial_rotary_factor", 1.0)
        if share > 1.0:
            raise ValueError(f"{rope.where}: partial_rotary_factor is {share}, wanted at most 1")
        R = int(E * share)
        if R % 2:
            raise ValueError(f"{rope.where}: head_dim is {E}, of which {R} columns turn; wanted an even number of them")
        theta = rope.positive("rope_theta", 10000.0)
        turns_F = theta ** (torch.arange(0, R, 2, dtype=torch.float32, device="cpu") / R)
        speeds_F, scaling = _KINDS[kind](rope, theta, turns_F)
        return cls(tuple(speeds_F.tolist()), scaling)


def table_length(raw: Mapping[str, Any], max_model_len: int) -> int | bool | None:
    """Return what a RoPE's table is computed for where requests are up to that length; None for all lengths alike.

    LongRoPE: whether its long table is in effect; "dynamic": the length, where it is beyond max_position_embeddings.
    """
    rope = _parameters(Reader({**raw, "max_model_len": max_model_len}, "config.json"))
    kind = rope.raw["rope_type"]
    if kind in _LONGROPE:
        return _is_long(rope)
    if kind == "dynamic":
        return max_model_len if max_model_len > rope.size("max_position_embeddings") else None
    return None


def context_lengths(raw: Mapping[str, Any]) -> tuple[int, int]:
    """Return the longest request where nobody asks for another, and the longest that may be asked for, in tokens.

    LongRoPE: its original length, at which short prompts are computed as trained, and max_position_embeddings. YaRN:
    the original length times its factor, where max_position_embeddings is less (Qwen2.5's recipe), for both.
    "dynamic": max_position_embeddings, up to which it changes nothing, and that times its factor.
    Source: vLLM's rule, https://docs.vllm.ai/en/latest/configuration/engine_args.html (max_model_len).
    """
    read = Reader(raw, "config.json")
    longest, rope = read.size("max_position_embeddings"), _parameters(read)
    kind = rope.raw["rope_type"]
    if kind in _LONGROPE:
        return min(rope.size("original_max_position_embeddings"), longest), longest
    if kind == "yarn":
        longest = max(longest, int(rope.size("original_max_position_embeddings") * rope.positive("factor")))
        return longest, longest
    if kind == "dynamic":
        return longest, int(longest * rope.positive("factor"))
    return longest, longest


def softmax_scale(read: Reader) -> float:
    """Return what YaRN multiplies the scores of DeepSeek's attention by: longer contexts want sharper ones."""
    rope = _parameters(read)
    if rope.raw["rope_type"] in (None, "default", "mrope") or not rope.raw.get("mscale_all_dim"):
        return 1.0
    return _mscale(rope.positive("factor"), rope.positive("mscale_all_dim")) ** 2


def _parameters(read: Reader) -> Reader:
    found = {**(read.part("rope_scaling") or read.part("rope_parameters"))}
    for name in ("rope_theta", "partial_rotary_factor", "max_position_embeddings", "max_model_len"):
        found.setdefault(name, read.raw.get(name))
    found.setdefault("rope_type", found.get("type"))
    original = "original_max_position_embeddings"
    # Phi-3 keeps it outside of its rope's parameters, and that one counts.
    found[original] = read.raw.get(original) or found.get(original) or found["max_position_embeddings"]
    return Reader(found, f"{read.where}: rope")


def _is_long(rope: Reader) -> bool:
    original = rope.size("original_max_position_embeddings")
    return rope.size("max_model_len", original) > original


def _default(rope: Reader, theta: float, turns_F: Tensor) -> tuple[Tensor, float]:
    return 1.0 / turns_F, 1.0


def _linear(rope: Reader, theta: float, turns_F: Tensor) -> tuple[Tensor, float]:
    return 1.0 / turns_F / rope.positive("factor"), 1.0


def _dynamic(rope: Reader, theta: float, turns_F: Tensor) -> tuple[Tensor, float]:
    """Unchanged up to max_position_embeddings; where requests may be longer, one table for all, of the longest.

    transformers takes the table by each batch's longest request, and keys computed before would have another.
    """
    trained, R = rope.size("max_position_embeddings"), 2 * len(turns_F)
    longest, factor = max(rope.size("max_model_len", trained), trained), rope.positive("factor")
    if R < 4:
        raise ValueError(f"{rope.where}: rope_type 'dynamic' with {R} columns that turn, wanted 4 or more")
    base = theta * ((factor * longest / trained) - (factor - 1)) ** (R / (R - 2))
    return 1.0 / base ** (torch.arange(0, R, 2, dtype=torch.float32, device="cpu") / R), 1.0


def _llama3(rope: Reader, theta: float, turns_F: Tensor) -> tuple[Tensor, float]:
    low, high = rope.positive("low_freq_factor"), rope.positive("high_freq_factor")
    if low >= high:
        raise ValueError(f"{rope.where}: low_freq_factor {low} is not below high_freq_factor {high}")
    factor, speeds_F = rope.positive("factor"), 1.0 / turns_F
    rotations_F = rope.positive("original_max_position_embeddings") / (2 * math.pi / speeds_F)
    kept_F = (rotations_F - low) / (high - low)
    between_F = (1 - kept_F) * speeds_F / factor + kept_F * speeds_F
    slow_or_between_F = torch.where(rotations_F < low, speeds_F / factor, between_F)
    return torch.where(rotations_F > high, speeds_F, slow_or_between_F), 1.0


def _yarn(rope: Reader, theta: float, turns_F: Tensor) -> tuple[Tensor, float]:
    """Fast pairs keep their speed, slow ones are slowed by factor, with a ramp over the columns between."""
    factor, original = rope.positive("factor"), rope.positive("original_max_position_embeddings")
    R = 2 * len(turns_F)

    def column(rotations: float) -> float:
        """Return where a pair makes that many rotations within the original context."""
        return R * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = column(rope.positive("beta_fast", 32.0)), column(rope.positive("beta_slow", 1.0))
    if rope.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    ramp_F = (torch.arange(R // 2, dtype=torch.float32, device="cpu") - low) / (high - low or 0.001)
    kept_F = 1 - ramp_F.clamp(0, 1)
    speeds_F = 1.0 / (factor * turns_F) * (1 - kept_F) + 1.0 / turns_F * kept_F
    if rope.raw.get("mscale") and rope.raw.get("mscale_all_dim"):
        usual = _mscale(factor, rope.positive("mscale")) / _mscale(factor, rope.positive("mscale_all_dim"))
    else:
        usual = _mscale(factor, 1.0)
    return speeds_F, rope.positive("attention_factor", usual)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(rope: Reader, theta: float, turns_F: Tensor) -> tuple[Tensor, float]:
    """One table for every request, the long one where requests may be longer than the original context.

    transformers takes the table by each request's present length, and with it the keys of a request that outgrows the
    original context would have to be computed again. vLLM and llama.cpp choose as here, by max_model_len.
    """
    original, longest = rope.size("original_max_position_embeddings"), rope.size("max_position_embeddings")
    factors = rope.numbers("long_factor" if _is_long(rope) else "short_factor", len(turns_F))
    factor = rope.positive("factor", longest / original)
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    factors_F = torch.tensor(factors, dtype=torch.float32, device="cpu")
    return 1.0 / (factors_F * turns_F), rope.positive("attention_factor", usual)


_LONGROPE = ("longrope", "su")  # "su": its name in Phi-3's first configurations
_KINDS: dict[str, Callable[[Reader, float, Tensor], tuple[Tensor, float]]] = {
    "default": _default,
    "mrope": _default,  # of text alone, whose positions are equal in all its dimensions
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,
}
