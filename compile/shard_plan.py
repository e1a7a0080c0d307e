"""Which weights ranks share out, and how: from the model's own plan, transformers' or a given one.

A plan maps patterns of paths, `*` for any part of one, to transformers' styles
(https://huggingface.co/docs/transformers/perf_infer_gpu_multi).
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from seamwise.passes import Parallel
from seamwise.passes.shard.sharder import EXPERTS, STYLES, WHOLE

from .capture import Captured

# The names that Seamwise's definitions share with checkpoints.
OWN_PLAN = {
    "model.embed_tokens": "embedding_rowwise",
    "*.self_attn.[qkv]_proj": "colwise",
    "*.self_attn.qkv_proj": "packed_colwise",
    "*.self_attn.q_b_proj": "colwise",
    "*.self_attn.kv_b_proj": "colwise",  # heads; the latents that it expands are whole, and cached once a rank
    "*.self_attn.o_proj": "rowwise",
    "*.gate_proj": "colwise",
    "*.up_proj": "colwise",
    "*.gate_up_proj": "packed_colwise",
    "*.down_proj": "rowwise",
    "lm_head": "colwise_gather_output",
}
_BIASES = ("bias", "_bias")  # a layer's bias follows its weight


def styles_of(captured: Captured, parallel: Parallel) -> dict[str, str]:
    """Return placeholder -> style of each weight that the plan shares out.

    Raises ValueError for a plan that names nothing in the model, or a style that Seamwise does not have.
    """
    plan = OWN_PLAN if parallel.plan is None else parallel.plan
    styles: dict[str, str] = {}
    for placeholder, name in captured.weights.items():
        if name.endswith(_BIASES):
            continue
        path = name.removesuffix("_packed").removesuffix(".weight")
        style = next((style for pattern, style in plan.items() if fnmatchcase(path, pattern)), None)
        of_experts = ".experts." in path
        if parallel.data:
            style = EXPERTS if of_experts and path.endswith("_proj") else None  # whatever the plan; scales follow
        elif style is not None and parallel.experts and of_experts:
            style = EXPERTS
        if style is None or style in WHOLE:
            continue
        if style not in STYLES:
            raise ValueError(f"tensor_parallel_plan: {name} has style {style!r}; wanted one of {', '.join(STYLES)}")
        styles[placeholder] = style
    if not styles and parallel.data:
        raise ValueError("enable_expert_parallel: the model has no experts; ranks without need nothing of each other")
    if not styles:
        raise ValueError(f"tensor_parallel_plan: none of {', '.join(plan)} is a weight of this model")
    return styles
