"""A checkpoint's tensors by the names, and in the form, that a transformers class has its parameters in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from seamwise.compile.parameter import Parameter

from .files import StoredTensor


def as_transformers_reads(
    found: Mapping[str, StoredTensor],
    parameters: Mapping[str, Parameter],
    architecture: str,
    raw: Mapping[str, Any],
) -> dict[str, StoredTensor]:
    """Return what transformers would load of these tensors into a class with these parameters.

    Imports transformers and builds the class, which takes seconds: for names that do not fit as they are. What stays
    without a parameter keeps its name; what the class ignores is not there.
    """
    from seamwise.model_defs.hf_loading import made_by_transformers

    made, _ = made_by_transformers(architecture, raw, found)
    tensors: dict[str, StoredTensor] = {}
    for name, one in made.items():
        sources = [found[source] for source in one.sources]
        if one.make is None:
            tensors[name if name in parameters else one.sources[0]] = sources[0]
            continue

        dtypes = {source.dtype for source in sources}
        tensors[name] = StoredTensor(
            shape=parameters[name].shape if name in parameters else (), stored_dtype=sources[0].stored_dtype,
            dtype=sources[0].dtype if len(dtypes) == 1 else None, load=partial(_load, one.make, found),
        )  # fmt: skip
    return tensors


def _load(make: Callable[[Callable[[str], Tensor]], Tensor], found: Mapping[str, StoredTensor]) -> Tensor:
    return make(lambda name: found[name].load()).contiguous()
