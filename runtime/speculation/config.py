"""The options of speculation, by vLLM's names.

Source: https://docs.vllm.ai/en/latest/features/spec_decode.html.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_OPTIONS = {  # method -> the options that it alone reads
    "ngram": ("prompt_lookup_min", "prompt_lookup_max"), "draft_model": ("model",), "first_layers": ("num_layers",),
    "mtp": (),
}  # fmt: skip
_DEFAULTS = {"prompt_lookup_min": 2, "prompt_lookup_max": 5}


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """How tokens are guessed.

    method                  "ngram": what followed the same tokens before, which is the default; "draft_model": a
                            smaller model, the default with `model`; "first_layers": the model's own, and its head;
                            "mtp" (or "deepseek_mtp"): the module that DeepSeek-V3 checkpoints have for it; or the name
                            that another package's drafter has
    num_speculative_tokens  guesses of a sequence that one step verifies, at most; a request may ask for fewer by
                            SamplingParams(extra_args={"num_speculative_tokens": 2}), 0: none
    prompt_lookup_min, prompt_lookup_max  "ngram": the last so many tokens (2 to 5) are looked for among the earlier
    model                   "draft_model": a directory, GGUF file or hub id with the same vocabulary
    num_layers              "first_layers": how many
    """

    method: str = ""
    num_speculative_tokens: int = 4
    prompt_lookup_min: int | None = None
    prompt_lookup_max: int | None = None
    model: str | Path | None = None
    num_layers: int | None = None

    def __post_init__(self) -> None:
        method = self.method or ("ngram" if self.model is None else "draft_model")
        method = "mtp" if method == "deepseek_mtp" else method
        object.__setattr__(self, "method", method)
        for owner, names in _OPTIONS.items():
            for name in names:
                if owner == method and getattr(self, name) is None:
                    if name not in _DEFAULTS:
                        raise ValueError(f"speculative_config: method {method!r} needs {name}")
                    object.__setattr__(self, name, _DEFAULTS[name])
                elif owner != method and method in _OPTIONS and getattr(self, name) is not None:
                    raise ValueError(
                        f"speculative_config: {name}={getattr(self, name)!r} is of method {owner!r}, got {method!r};"
                        " leave one out"
                    )
        for name in ("num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max", "num_layers"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"speculative_config: {name}={value!r}, wanted a whole number above 0")
        if self.prompt_lookup_min and self.prompt_lookup_max and self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(
                f"speculative_config: prompt_lookup_min={self.prompt_lookup_min} is above"
                f" prompt_lookup_max={self.prompt_lookup_max}"
            )

    def check_ranks(self, num_ranks: int) -> None:
        """Raise ValueError where the model runs on several ranks and is guessed for by one that runs on one."""
        if num_ranks > 1 and self.method in ("draft_model", "first_layers", "mtp"):
            raise ValueError(
                f"speculative_config: method {self.method!r} runs on one rank; leave it, or tensor_parallel_size,"
                " pipeline_parallel_size and data_parallel_size, out"
            )
