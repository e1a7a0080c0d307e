"""How experts are balanced over ranks, by vLLM's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .arguments import options_of


@dataclass(frozen=True, slots=True, kw_only=True)
class EPLBConfig:
    """Options of enable_eplb.

    window_size            steps whose loads count
    step_interval          steps from one look at the placement to the next
    num_redundant_experts  places for further copies of experts, of all ranks together
    """

    window_size: int = 1000
    step_interval: int = 3000
    num_redundant_experts: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), int(field.name != "num_redundant_experts")
            if type(value) is not int or value < least:
                raise ValueError(f"eplb_config: {field.name}={value!r}; wanted a whole number of at least {least}")

    @classmethod
    def of(cls, enabled: bool, given: EPLBConfig | Mapping[str, Any] | None) -> EPLBConfig | None:
        """Return the options, None where nothing is balanced. Raises ValueError for others than there are."""
        if not enabled:
            if given is not None:
                raise ValueError("eplb_config needs enable_eplb=True, which it is of")
            return None
        return options_of(cls, given, "eplb_config") or cls()
