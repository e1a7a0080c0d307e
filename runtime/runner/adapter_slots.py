"""The adapters that a runner's steps can mix: a slot each, written in place, so that what was recorded stays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seamwise.compile.program import Executable
from seamwise.passes.add_adapters import INPUT
from seamwise.runtime.weights.read_adapter import Adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A layer of the program, joined of one or more of the model's: their paths, widths, and places of the weights."""

    modules: tuple[str, ...]
    widths: tuple[int, ...]
    inputs: int
    places: dict[str, int]


class AdapterSlots:
    """Slots 1 to max_loras of one runner; slot 0 is no adapter.

    in_step  whether the program has an input that says which row has which
    held     what each slot holds
    """

    def __init__(self, executable: Executable) -> None:
        self._executable = executable
        self.in_step = INPUT in executable.program.inputs
        self._always = bool(executable.program.packages)  # Inductor's code is of rows that each say which they have
        self.sites = _sites(executable.program.recipes.values())
        self.held: dict[int, Adapter] = {}
        shapes = [executable.weights[site.places["b"]].shape for site in self.sites]
        self.max_loras, self.max_rank = (shapes[0][0], shapes[0][1]) if shapes else (0, 0)

    def check(self, adapter: Adapter) -> None:
        """Raise ValueError that lists all in which an adapter does not fit the model."""
        known = {n: (w, site.inputs) for site in self.sites for n, w in zip(site.modules, site.widths, strict=True)}
        problems = []
        for name, layer in adapter.layers.items():
            (rank, inputs), outputs = layer.a_RK.shape, layer.b_NR.shape[0]
            if name not in known:
                problems.append(f"{name} is no linear layer of this model that adapters change")
            elif (outputs, inputs) != known[name]:
                wanted = f"{known[name][1]} inputs and {known[name][0]} outputs"
                problems.append(f"{name} has {inputs} inputs and {outputs} outputs, wanted {wanted}")
            elif rank > self.max_rank:
                problems.append(f"{name} has rank {rank}, max_lora_rank={self.max_rank}; raise it")
        if problems:
            more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
            raise ValueError(f"the adapter does not fit: {'; '.join(problems[:12])}{more}")

    @torch.inference_mode()
    def write(self, slot: int, adapter: Adapter | None) -> None:
        """Put an adapter that `check` let pass into a slot, or nothing; no step may be running."""
        if not 1 <= slot <= self.max_loras:
            raise ValueError(f"adapter slot {slot}: wanted 1 to {self.max_loras} (max_loras)")
        before = self.held.pop(slot, None)
        touched = {name for one in (before, adapter) if one is not None for name in one.layers}
        for site in self.sites:
            if touched.isdisjoint(site.modules):
                continue  # nothing is there, and its memory need not be touched
            a, b, scaling = (self._executable.weights[site.places[role]][slot - 1] for role in ("a", "b", "scaling"))
            for part in (a, b, scaling):
                part.zero_()
            start = 0
            for p, (name, width) in enumerate(zip(site.modules, site.widths, strict=True)):
                if adapter is not None and (layer := adapter.layers.get(name)) is not None:
                    rank = layer.a_RK.shape[0]
                    a[p * self.max_rank : p * self.max_rank + rank] = layer.a_RK.to(a.dtype)
                    b[:rank, start : start + width] = layer.b_NR.T.to(b.dtype)
                    scaling[p] = layer.scaling
                start += width
        if adapter is not None:
            self.held[slot] = adapter

    def restore(self) -> None:
        """Write what the slots hold again, after their memory was given away."""
        for slot, adapter in list(self.held.items()):
            self.write(slot, adapter)

    def of_rows(self, slots_R: Tensor | None, starts_S: Tensor) -> Tensor:
        """Return the program's input for a step: (T,) int32, each row's slot less one, -1 without an adapter.

        Where no row has one it is (0,), and what computes adapters is left out of the step and of its recording.
        Raises ValueError for a slot that holds none.
        """
        if slots_R is None or not slots_R.any():
            return torch.full((int(starts_S[-1]) * self._always,), -1, dtype=torch.int32)
        if wrong := {*slots_R.tolist()} - {0, *self.held}:
            there = ", ".join(map(str, sorted(self.held))) or "none"
            raise ValueError(f"StepInput.adapter_slots names {min(wrong)}; slots that hold an adapter: {there}")
        return torch.repeat_interleave(slots_R - 1, starts_S.diff())


def _sites(recipes: Iterable[dict[str, Any]]) -> list[Site]:
    found: dict[tuple[str, ...], dict[str, tuple[int, dict[str, Any]]]] = {}
    for place, recipe in enumerate(recipes):
        if "adapter" in recipe:
            found.setdefault(tuple(recipe["modules"]), {})[recipe["adapter"]] = place, recipe
    sites = []
    for modules, roles in found.items():
        made, places = roles["a"][1], {role: place for role, (place, _) in roles.items()}
        sites.append(Site(modules=modules, widths=tuple(made["widths"]), inputs=made["shape"][2], places=places))
    return sites
