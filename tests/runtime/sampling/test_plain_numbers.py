"""Options computed with numpy or torch are Python's; an argument that there is not is refused with the nearest."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

import numpy as np
import pytest
import torch

from seamwise import SamplingParams
from seamwise.runtime.build.arguments import named_arguments


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"max_tokens": np.int64(5), "n": np.uint8(2)}, {"max_tokens": 5, "n": 2}),
        ({"temperature": np.float32(0.5), "top_p": np.float64(0.25)}, {"temperature": 0.5, "top_p": 0.25}),
        ({"temperature": torch.tensor(0.5), "top_k": torch.tensor(3)}, {"temperature": 0.5, "top_k": 3}),
        ({"ignore_eos": np.bool_(True)}, {"ignore_eos": True}),
        ({"stop_token_ids": np.array([1, 2])}, {"stop_token_ids": [1, 2]}),
        ({"stop_token_ids": [np.int32(1), 2]}, {"stop_token_ids": [1, 2]}),
        ({"stop_token_ids": torch.tensor([1, 2])}, {"stop_token_ids": [1, 2]}),
        ({"logit_bias": {np.int64(3): np.float32(0.5), 4: 1}}, {"logit_bias": {3: 0.5, 4: 1}}),
        ({"stop": np.array(["a", "b"])}, {"stop": ["a", "b"]}),
    ],
)
def test_numbers_of_numpy_and_torch_are_pythons(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    params = SamplingParams(**given)
    assert params == SamplingParams(**wanted)
    got = {name: getattr(params, name) for name in wanted}
    assert json.dumps(got) == json.dumps(wanted), "numpy's numbers are no JSON"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_tokens": np.float64(5.5)}, "max_tokens: got 5.5, wanted a whole number"),
        ({"temperature": np.array([0.5])}, r"temperature: got \[0.5\], wanted a number"),
        ({"stop_token_ids": np.array(5)}, "stop_token_ids: got 5, wanted None or a sequence"),
        ({"top_p": np.float32("nan")}, "top_p: got nan"),
    ],
)
def test_wrong_ones_are_named_as_ever(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**given)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("temprature", "no argument of SamplingParams: 'temprature'; did you mean temperature?"),
        ("max_new_tokens", "no argument of SamplingParams: 'max_new_tokens'; use max_tokens"),
        ("xyzzy", "no argument of SamplingParams: 'xyzzy'; wanted one of .*frequency_penalty, .*top_p"),
        ("best_of", "'best_of'; use n"),
        ("do_sample", "'do_sample'; use temperature"),
    ],
)
def test_an_unknown_argument_is_named_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**{name: 1})


def test_a_checked_dataclass_is_one_still() -> None:
    params = SamplingParams(max_tokens=3)
    assert dataclasses.replace(params, max_tokens=4).max_tokens == 4
    assert "temperature" in inspect.signature(SamplingParams).parameters
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.max_tokens = 5  # type: ignore[misc]


def test_functions_too() -> None:
    @named_arguments(colour="use color")
    def paint(thing: str, *, color: str = "red") -> str:
        return thing + color

    assert paint("a", color="b") == "ab"
    messages = {"colour": "use color", "colr": r"did you mean color\?", "zz": "wanted one of color, thing"}
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            paint("a", **{name: 1})
