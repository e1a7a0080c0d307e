"""Both entries trace to one graph that holds for every number of tokens, requests, blocks and logit rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from step_inputs import Steps, whole
from tiny_models import load_tiny, save_tiny

from seamwise.compile.capture import capture
from seamwise.runtime.build.step import STEP_ARGUMENTS, capture_dims

DIMS: dict[str, Any] = capture_dims([[(0, 0, 0)] * 2] * 2)  # two layers, keys and values


@pytest.mark.parametrize("entry", ["own", "transformers"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_graph_equals_the_module_at_other_sizes(entry: str, tied: bool, tmp_path: Path) -> None:
    save_tiny(tmp_path, "LlamaForCausalLM", tie_word_embeddings=tied)
    model, config = load_tiny(tmp_path, entry)
    geometry = (config.num_layers, config.num_kv_heads, config.head_dim, torch.float32)

    def arguments(requests: list[list[int]], **options: Any) -> dict[str, Any]:
        steps = Steps(requests, **options)
        caches = [list(pair) for pair in steps.caches(*geometry)]
        step = {"kv_caches": caches, **steps.next(whole(requests)[0])}
        return {name: step[name] for name in STEP_ARGUMENTS}

    captured = capture(model, arguments([[1, 2, 3, 4, 5], [6, 7]]), DIMS)
    targets = [str(n.target) for n in captured.graph.nodes]
    assert targets.count("seamwise.attention.default") == targets.count("seamwise.kv_append.default") == 2
    weights = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for requests in ([[9]], [list(range(30)), [1], [2, 3, 4]]):
        want = arguments(requests, num_padding=2)
        got = arguments(requests, num_padding=2)
        flat = [t for pair in got.pop("kv_caches") for t in pair]
        inputs = [got.pop("token_ids"), got.pop("positions"), *flat, *got.values()]
        with torch.no_grad():
            run = torch.fx.Interpreter(captured.module).run
            (logits,) = run(*(weights[name] for name in captured.weights.values()), *inputs)
            torch.testing.assert_close(logits, model(**want))
