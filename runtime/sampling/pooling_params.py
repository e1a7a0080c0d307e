"""What a request for a vector asks, with vLLM's names, and the vector that a pooled state becomes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from seamwise.runtime.build.arguments import named_arguments
from seamwise.runtime.build.pooler import Pooler

from .params import RequestOutputKind, SamplingParams


@named_arguments(normalize="use use_activation", truncate_prompt_tokens="cut the prompt's ids before")
@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """Options of one text's vector; None: as the model's pooler says.

    dimensions      so many first elements, of a model that was trained for it
    use_activation  whether the vector is given length 1
    """

    dimensions: int | None = None
    use_activation: bool | None = None


NO_SAMPLING = SamplingParams(
    max_tokens=1, temperature=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
)  # of a request that is pooled


def finish(state_D: np.ndarray, pooler: Pooler, params: PoolingParams) -> np.ndarray:
    """Return the float32 vector (dimensions,) of a pooled state in float64: cut, then normalized.

    Raises RuntimeError for a state that is no number.
    """
    if not np.isfinite(state_D).all():
        raise RuntimeError("the model's hidden state is infinite or no number")
    dimensions = pooler.dimensions if params.dimensions is None else params.dimensions
    cut = state_D[:dimensions]
    if pooler.normalize if params.use_activation is None else params.use_activation:
        cut = cut / max(float(np.linalg.norm(cut)), 1e-12)  # as torch.nn.functional.normalize
    return cut.astype(np.float32)
