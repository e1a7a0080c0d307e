"""Which adapter a request is computed with, by vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """An adapter: what people call it, its number (1 or above), the directory that PEFT saved.

    load_inplace  read the directory again where the number is known already: requests that run keep what they have
    """

    lora_name: str
    lora_int_id: int
    lora_path: str
    load_inplace: bool = False

    def __post_init__(self) -> None:
        if not self.lora_name or not isinstance(self.lora_name, str):
            raise ValueError(f"lora_name={self.lora_name!r}: wanted a name")
        if type(self.lora_int_id) is not int or self.lora_int_id < 1:
            raise ValueError(f"lora_int_id={self.lora_int_id!r}: wanted a whole number of at least 1")
        if not self.lora_path or not isinstance(self.lora_path, str):
            raise ValueError(f"lora_path={self.lora_path!r}: wanted a directory with adapter_config.json")
