"""What a caller gives as new weights: pairs or a dict, of torch's tensors or numpy's arrays; anything else is named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_WANTED = "(the checkpoint's name, tensor) pairs, or a dict of them"


def named_tensors(weights: Iterable[Any] | Mapping[str, Any]) -> dict[str, Tensor]:
    """Return weights by name. Raises ValueError that lists all that are no tensors, hold no values, or come twice."""
    pairs = weights.items() if isinstance(weights, Mapping) else weights
    if isinstance(pairs, (str, bytes, Tensor, np.ndarray)) or not isinstance(pairs, Iterable):
        raise ValueError(f"update_weights: got {type(pairs).__name__}, wanted {_WANTED}")
    found: dict[str, Tensor] = {}
    problems: list[str] = []
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str):
            raise ValueError(f"update_weights: got {_described(pair)}, wanted {_WANTED}")
        name, value = pair
        if name in found:
            problems.append(f"{name} is given twice")
        elif (tensor := _tensor(value)) is None:
            problems.append(f"{name} is {_described(value)}, wanted a tensor or an array of floats")
        elif tensor.is_meta:
            problems.append(f"{name} is on the device meta, which holds no values; load it first")
        elif tensor.layout is not torch.strided:
            problems.append(f"{name} is {tensor.layout}, wanted a dense tensor; call to_dense() first")
        else:
            found[name] = tensor
    if problems:
        raise ValueError("update_weights: " + "; ".join(problems))
    return found


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray):
        try:
            return torch.from_numpy(np.ascontiguousarray(value))
        except TypeError:  # of strings, objects, or a dtype that torch does not have
            return None
    return None


def _described(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    return f"a {type(value).__name__}" + (f" of length {len(value)}" if isinstance(value, (list, tuple)) else "")


class ModelWeights:
    """What RL trainers know as vLLM's model: the one call that writes weights. Others are the runner's."""

    def __init__(self, write: Callable[[Any], None]) -> None:
        self._write = write

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Write weights, all at once or one by one; return the names given. Raises ValueError for what does not fit."""
        given = named_tensors(weights)
        self._write(given)
        return {*given}
