"""The adapters that a runner's steps can mix: a slot each, written in place, so that what was recorded stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seamwise.compile.program import Executable, Program
from seamwise.passes.add_adapters import INPUT, AdaptedLayer
from seamwise.runtime.weights.read_adapter import Adapter, LowRank


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A layer of the program, joined of one or more of the model's, and places of its weights."""

    layers: tuple[AdaptedLayer, ...]
    places: dict[str, int]


class NotWritten(RuntimeError):
    """An adapter could not be put into a slot, which is empty now on every rank."""


class AdapterSites:
    """Where a program takes adapters: max_loras of them in a step, of max_rank; both 0 where it takes none."""

    def __init__(self, program: Program) -> None:
        self.sites, self.max_loras, self.max_rank = list[Site](), 0, 0
        found: dict[tuple[str, ...], dict[str, tuple[int, dict[str, Any]]]] = {}
        for place, recipe in enumerate(program.recipes.values()):
            if "adapter" in recipe:
                name = tuple(layer["module"] for layer in recipe["layers"])
                found.setdefault(name, {})[recipe["adapter"]] = place, recipe
        for roles in found.values():
            made = roles["b"][1]
            self.max_loras, self.max_rank, _ = made["shape"]
            layers = tuple(AdaptedLayer(**layer) for layer in made["layers"])
            self.sites.append(Site(layers=layers, places={role: place for role, (place, _) in roles.items()}))

    @property
    def layers(self) -> list[AdaptedLayer]:
        return [layer for site in self.sites for layer in site.layers]

    def check(self, adapter: Adapter) -> None:
        """Raise ValueError that lists all in which an adapter does not fit, or where enable_lora was not asked for."""
        if not self.sites:
            raise ValueError("this model was loaded without adapters; give it enable_lora=True")
        known = {layer.module: tuple(layer.shape) for layer in self.layers}
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


class AdapterSlots(AdapterSites):
    """Slots 1 to max_loras of one runner; slot 0 is no adapter.

    in_step  whether the program has an input that says which row has which
    held     what each slot holds
    """

    def __init__(self, executable: Executable) -> None:
        super().__init__(executable.program)
        self._executable = executable
        self.in_step = INPUT in executable.program.inputs
        self._always = bool(executable.program.packages)  # Inductor's code is of rows that each say which they have
        self.held: dict[int, Adapter] = {}
        self._written: dict[int, set[str]] = {}  # by slot the modules that may have values there

    @torch.inference_mode()
    def write(self, slot: int, adapter: Adapter | None) -> None:
        """Put an adapter that `check` let pass into a slot, or nothing; no step may be running.

        Raises NotWritten where that fails: the slot is empty then.
        """
        if not 1 <= slot <= self.max_loras:
            raise ValueError(f"adapter slot {slot}: wanted 1 to {self.max_loras} (max_loras)")
        self.held.pop(slot, None)
        try:
            self._fill(slot, {} if adapter is None else adapter.layers)
        except Exception as error:
            self._fill(slot, {})
            raise NotWritten(f"adapter slot {slot}: {type(error).__name__}: {error}") from error
        if adapter is not None:
            self.held[slot] = adapter

    def _fill(self, slot: int, layers: Mapping[str, LowRank]) -> None:
        """Write layers, and zeros where others were."""
        touched = self._written[slot] = self._written.get(slot, set()) | layers.keys()
        for site in self.sites:
            if touched.isdisjoint(layer.module for layer in site.layers):
                continue  # nothing is there, and its memory need not be touched
            a, b, scaling = (self._executable.weights[site.places[role]][slot - 1] for role in ("a", "b", "scaling"))
            for part in (a, b, scaling):
                part.zero_()
            start = 0
            for p, layer in enumerate(site.layers):
                if (update := layers.get(layer.module)) is not None:
                    a_RK, b_NR = layer.part_of(update.a_RK, update.b_NR)
                    (rank, _), rows = a_RK.shape, b_NR.shape[0]
                    a[p * self.max_rank : p * self.max_rank + rank] = a_RK.to(a.dtype)
                    b[:rank, start : start + rows] = b_NR.T.to(b.dtype)
                    scaling[p] = update.scaling
                start += layer.width
        self._written[slot] = {*layers}

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
