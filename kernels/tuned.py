"""Measured winners: which provider of a contract was fastest at a shape on a device, from `tuned/<device>.json`.

A file holds {contract: [[most rows, *shape, provider], …]}, where (rows, *shape) is what the contract's `tuned_by`
key returns. Where a device has no file or a shape no entry, providers are taken in the order they were registered.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "tuned"


def device_name(device: str) -> str:
    """Return the name of a device type's file: the GPU's product name, or the type itself."""
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name().replace(" ", "-")
    return device


@cache
def read_table(path: Path) -> dict[str, list[list[Any]]]:
    """Return a file's winners by contract; none when there is no file."""
    return json.loads(path.read_text()) if path.exists() else {}


def winner(contract: str, device: str, key: Sequence[Any]) -> str | None:
    """Return the provider fastest at a key, "measured" when that depends on rows not known yet, or None."""
    measured = read_table(FOLDER / f"{device_name(device)}.json").get(contract, [])
    entries = sorted((bound, provider) for bound, *shape, provider in measured if shape == list(key[1:]))
    if isinstance(key[0], torch.SymInt):
        return "measured" if entries else None
    return next((provider for bound, provider in entries if key[0] <= bound), None)
