"""Weights computed from one of several tensors that an op gives (HYV4 takes scales apart)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seamwise.compile.capture import capture
from seamwise.compile.derive import evaluate, hoist, parameters_of


class Apart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0, 3.0, 5.0]))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.scale.unbind(0)
        return x * first + third * second


def test_a_recipe_takes_one_of_what_an_op_gives() -> None:
    model, x = Apart(), torch.arange(4.0)
    captured = capture(model, {"x": x}, {"x": ("T",)})
    recipes = hoist(captured)
    assert {name for recipe in recipes.values() for name in parameters_of(recipe)} == {"scale"}
    values = [evaluate(recipe, {"scale": model.scale.detach()}.__getitem__) for recipe in recipes.values()]
    assert sorted(float(v) for v in values) == [2.0, 15.0]
