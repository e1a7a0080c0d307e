"""Guess with the model's own first layers and its head: no other weights, and no other KV cache.

The first layers' keys of what is computed are in the model's blocks already; those of guesses go behind them, where the
step that verifies them writes the same again. So a prompt costs nothing, and a prefix that is shared is shared.
Source: Zhang et al. 2023, https://arxiv.org/abs/2309.08168; Elhoushi et al. 2024, https://arxiv.org/abs/2404.16710.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from seamwise.runtime.runner.runner import ModelRunner
from seamwise.runtime.runner.shared_weights import first_layers, groups_of

from .drafter import Known
from .model_drafter import ModelDrafter, Place


class FirstLayers(ModelDrafter):
    """A ModelDrafter over the first `num_layers` layers of a model."""

    in_place = True

    def __init__(self, whole: ModelRunner, num_layers: int, budget: int) -> None:
        super().__init__(first_layers(whole, num_layers), budget)
        self.whole = whole
        self._groups = groups_of(whole, self.runner)

    def allocate(self, num_blocks: int) -> None:
        self.runner.use_kv(self.whole.kv_caches[: self.runner.config.num_layers], num_blocks)

    def wake(self, tags: Iterable[str] | None) -> None:
        if not self.whole.asleep:  # on a GPU all memory is other memory now
            self.runner.executable.weights = first_layers(self.whole, self.runner.config.num_layers).executable.weights
            self.allocate(self.whole.num_blocks)

    def places(self, known: Sequence[Known]) -> list[Place]:
        return [Place(i, one.tables[self._groups], len(one.tokens) - 1) for i, one in enumerate(known)]
