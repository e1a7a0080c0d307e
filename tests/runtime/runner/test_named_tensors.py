"""New weights as callers have them: pairs, dicts and arrays are taken; what is none is named, and nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from step_inputs import Steps, whole

from seamwise import ModelRunner, StepInput
from seamwise.runtime.runner.named_tensors import named_tensors

NORM = "model.norm.weight"


@pytest.fixture
def runner(tiny_llama_dir: Path, pack_dir: Path) -> ModelRunner:
    runner = ModelRunner.load(tiny_llama_dir, dtype="float32", device="cpu", pack_dir=pack_dir)
    runner.allocate_kv(Steps([[3, 4, 5]], block_size=16).num_blocks)
    return runner


def logits(runner: ModelRunner) -> torch.Tensor:
    requests = [[3, 4, 5]]
    return runner.step(StepInput(**Steps(requests, block_size=16).next(whole(requests)[0]))).logits.clone()


def test_pairs_dicts_and_arrays_are_the_same(runner: ModelRunner, tiny_llama_dir: Path) -> None:
    before, old = logits(runner), load_file(tiny_llama_dir / "model.safetensors")[NORM]
    new = old * 2
    array = np.stack([new.numpy(), new.numpy()])[::-1][0].astype(np.float64)
    wanted = None
    for form in (
        [(NORM, new)],
        iter([[NORM, new]]),
        {NORM: new},
        {NORM: new.numpy()},
        {NORM: array},
        {NORM: array[::1]},
    ):
        runner.update_weights(form)
        got = logits(runner)
        wanted = got if wanted is None else wanted
        assert torch.equal(got, wanted) and not torch.equal(got, before)
        runner.update_weights({NORM: old})
        assert torch.equal(logits(runner), before)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({NORM: [1.0, 2.0]}, f"{NORM} is a list of length 2, wanted a tensor or an array"),
        ({NORM: 1.0}, f"{NORM} is a float, wanted"),
        ({NORM: torch.ones(64).to_sparse()}, f"{NORM} is torch.sparse_coo, wanted a dense tensor"),
        ({NORM: None}, f"{NORM} is a NoneType, wanted"),
        ({NORM: np.array(["a"])}, f"{NORM} is an array of <U1, wanted"),
        ({NORM: np.zeros(64, dtype=np.int32)}, f"dtype of {NORM} is int32, wanted one of float32"),
        ({NORM: torch.ones(64, device="meta")}, f"{NORM} is on the device meta, which holds no values"),
        ([(NORM, torch.ones(64)), (NORM, torch.ones(64))], f"{NORM} is given twice"),
        ([(NORM, 1), ("x", 2)], f"{NORM} is a int, .*; x is a int"),
        ([torch.ones(64)], "got a Tensor, wanted .the checkpoint's name, tensor. pairs"),
        ([(NORM, torch.ones(64), 1)], "got a tuple of length 3, wanted"),
        ([(3, torch.ones(64))], "got a tuple of length 2, wanted"),
        (NORM, "got str, wanted"),
        (torch.ones(64), "got Tensor, wanted"),
        (np.ones(64), "got ndarray, wanted"),
        (None, "got NoneType, wanted"),
        (7, "got int, wanted"),
    ],
)
def test_what_are_no_weights_is_named_and_changes_nothing(runner: ModelRunner, weights: Any, message: str) -> None:
    before = logits(runner)
    with pytest.raises(ValueError, match=f"update_weights: (?s:.*){message}"):
        runner.update_weights(weights)
    assert torch.equal(logits(runner), before)


def test_views_of_any_order_are_their_values() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    for view in (array.T, array[::-1], array[:, ::2]):
        assert np.array_equal(named_tensors({"x": view})["x"].numpy(), view)
