"""Seamwise: an LLM inference library whose compiler you can see, test and trust.

    from seamwise import LLM, SamplingParams
    print(LLM("path/to/model").generate("Hello", SamplingParams(max_tokens=16))[0].outputs[0].text)

Importing this module imports nothing else: each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seamwise.runtime.build.step import StepInput, StepOutput
    from seamwise.runtime.engine.lora_request import LoRARequest
    from seamwise.runtime.engine.outputs import CompletionOutput, RequestOutput
    from seamwise.runtime.runner.runner import ModelRunner
    from seamwise.runtime.sampling.params import SamplingParams
    from seamwise.runtime.serve.async_llm import AsyncLLM
    from seamwise.runtime.serve.llm import LLM

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "LoRARequest",
    "ModelRunner",
    "RequestOutput",
    "SamplingParams",
    "StepInput",
    "StepOutput",
]

_HOMES = {
    "LLM": "serve.llm",
    "AsyncLLM": "serve.async_llm",
    "CompletionOutput": "engine.outputs",
    "LoRARequest": "engine.lora_request",
    "RequestOutput": "engine.outputs",
    "ModelRunner": "runner.runner",
    "SamplingParams": "sampling.params",
    "StepInput": "build.step",
    "StepOutput": "build.step",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'seamwise' has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(importlib.import_module(f"seamwise.runtime.{_HOMES[name]}"), name)
