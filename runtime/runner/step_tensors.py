"""A step's tensors on their way into a program, and what comes out of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.runtime.build.runner_config import RunnerConfig
from seamwise.runtime.build.step import STEP_ARGUMENTS, StepInput


def on_device(batch: StepInput, device: str) -> StepInput:
    """Return what a program reads of a step, on its device."""
    if torch.device(device).type == "cpu":
        return batch
    moved = {n: getattr(batch, n).to(device) for n in STEP_ARGUMENTS if n != "kv_caches"}
    if batch.token_adapters is not None:
        moved["token_adapters"] = batch.token_adapters.to(device)
    return StepInput(**moved)


def logits_and_hidden(results: Any, options: RunnerConfig) -> tuple[Tensor, Tensor | None]:
    """Return a program's results, hidden states where it gives them; a model that pools has logits of width 0."""
    if options.pooler is not None:
        return results[:, :0], results
    return results if options.return_hidden_states else (results, None)


def no_results(options: RunnerConfig, vocab_size: int, hidden_size: int) -> Any:
    """Return what a program would give of no rows."""
    logits, hidden = (
        torch.empty(0, size, dtype=options.dtype, device=options.device) for size in (vocab_size, hidden_size)
    )
    if options.pooler is not None:
        return hidden
    return (logits, hidden) if options.return_hidden_states else logits
